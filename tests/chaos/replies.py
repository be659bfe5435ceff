"""What is asked, and how a reply is held against the one that it should be. Pure.

Owns: the requests, and what counts as lost, doubled and wrong. Must not know: clients, faults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from random import Random
from typing import NamedTuple

from services.client import GenerateOptions
from services.common.values import VerificationMethod


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and options with a seed: what it is answered depends on nothing else, unless it uses rejection."""

    prompt: tuple[int, ...]
    options: GenerateOptions

    @property
    def is_repeatable(self) -> bool:
        return self.options.verification is not VerificationMethod.REJECTION


class Differences(NamedTuple):
    """Tokens by what is wrong with them."""

    num_lost: int = 0
    num_doubled: int = 0
    num_wrong: int = 0


def requests(number: int, choose: Random, *, token_ids: range, max_tokens: range) -> list[Request]:
    """In turns greedy, coupled, coupled without speculation or with log-probabilities, and rejection."""
    found = []
    for i in range(number):
        options = GenerateOptions(
            max_tokens=choose.choice(max_tokens),
            temperature=0.0 if i % 4 == 0 else 1.0,
            seed=choose.getrandbits(64),
            ignore_eos=True,
            verification=VerificationMethod.REJECTION if i % 4 == 3 else VerificationMethod.COUPLED,
            num_draft_tokens=0 if i % 16 == 2 else None,
            log_probs=i % 16 == 6,
        )
        prompt = tuple(choose.choice(token_ids) for _ in range(choose.randrange(10, 300)))
        found.append(Request(prompt, options))
    return found


def differences(expected: Sequence[int], received: Sequence[int]) -> Differences:
    """By the shortest way from one to the other: what is missing is lost, what repeats its neighbour is doubled, all
    else is wrong."""
    num_lost = num_doubled = num_wrong = 0
    expected, received = tuple(expected), tuple(received)
    matcher = SequenceMatcher(None, expected, received, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        number = j2 - j1
        if tag == "delete":
            num_lost += i2 - i1
        elif tag == "insert" and received[j1:j2] in (received[j1 - number : j1], received[j2 : j2 + number]):
            num_doubled += number
        elif tag != "equal":
            num_wrong += max(number, i2 - i1)
    return Differences(num_lost, num_doubled, num_wrong)
