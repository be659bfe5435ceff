"""One reply as its client receives it, over all calls that it takes.

Owns: what was delivered, how long the client waited, and whether text and tokens belong together. Must not know: how
calls are made, faults' effects.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from services.client import Chunk
from tests.chaos.faults import Kind, Role
from tests.chaos.replies import Differences, Request


@dataclass(slots=True)
class Wait:
    """What a fault does to a reply: the longest time that it went without a token since the fault began."""

    fault: tuple[Role, Kind]
    last_at: float
    longest_s: float = 0.0
    is_over: bool = False
    """The fault has ended: the next token is the last one to count."""

    def token(self, now: float) -> None:
        self.longest_s, self.last_at = max(self.longest_s, now - self.last_at), now


class Reply:
    """`call_began`, then `take` for each chunk of the call; again where another call was needed."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.session_id, self.request_id = str(uuid.uuid4()), str(uuid.uuid4())
        self.began_at = time.monotonic()
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        """Of each call, as far as it came."""
        self.num_taken = 0
        """Tokens of the present call."""
        self.num_changed = 0
        """Tokens that a later call delivered otherwise."""
        self.last_at = 0.0
        self.wait: Wait | None = None

    @property
    def name(self) -> str:
        options = self.request.options
        return f"session {self.session_id} ({options.verification.value}, temperature {options.temperature:g})"

    def call_began(self) -> None:
        """It delivers the reply from its beginning."""
        self.texts.append("")
        self.num_taken = 0

    def take(self, chunk: Chunk) -> None:
        token_ids = [token.token_id for token in chunk.tokens]
        known = self.token_ids[self.num_taken : self.num_taken + len(token_ids)]
        self.num_changed += sum(one != other for one, other in zip(known, token_ids, strict=False))
        self.token_ids += token_ids[len(known) :]
        self.texts[-1] += chunk.text
        self.num_taken += len(token_ids)

    def text_differences(self, expected: str, result: str) -> Differences:
        """Texts that are not what the tokens say: the result's, the last call's, and each earlier call's beginning."""
        *broken_off, last = self.texts
        wrong = [result != expected, last != expected, *(not expected.startswith(text) for text in broken_off)]
        return Differences(num_wrong=sum(wrong))
