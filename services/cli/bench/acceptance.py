"""What became of drafted tokens, over whole outputs and over what comes before they repeat themselves.

Owns: acceptance's definitions and where an output begins to repeat. Must not know: times, tables. Pure.

Conditional acceptance alpha_i = accepted at position i / verified there with everything before accepted; a position
that was not reached is censored. Greedy decoding of small models falls into loops, which any drafter predicts:
acceptance before repetition leaves out the rounds that begin behind the first run of 16 tokens that occurred before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from services.cli.bench.sample import Sample
from services.client import Round

REPEATED_LEN = 16


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`alpha` is the conditional acceptance, pooled over positions. None where nothing was drafted."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_rate: float | None
    mean_acceptance_length: float | None
    acceptance_rate_per_position: tuple[float, ...]
    conditional_acceptance_per_position: tuple[float, ...]
    alpha: float | None


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Rounded to four digits; None where there is nothing to divide."""
    return round(numerator / denominator, 4) if numerator is not None and denominator else None


def acceptance_of(samples: Iterable[Sample]) -> Acceptance:
    """Pools the counts of generations."""
    statistics = [sample.statistics for sample in samples]
    return _acceptance(
        sum(s.num_drafts for s in statistics),
        sum(s.num_draft_tokens for s in statistics),
        [sum(at) for at in zip_longest(*(s.num_accepted_tokens_per_pos for s in statistics), fillvalue=0)],
        [sum(at) for at in zip_longest(*(s.num_verified_tokens_per_pos for s in statistics), fillvalue=0)],
    )


def acceptance_before_repetition(samples: Iterable[Sample]) -> Acceptance:
    """As acceptance_of, without the rounds that begin behind a first repeated run of 16 tokens."""
    return _of_rounds([r for sample in samples for r in rounds_before(sample, repetition_end(sample.token_ids))])


def repetition_end(token_ids: Sequence[int], length: int = REPEATED_LEN) -> int | None:
    """The index behind the first run of `length` tokens that occurred before, overlapping or not; None without one."""
    seen: set[tuple[int, ...]] = set()
    for end in range(length, len(token_ids) + 1):
        run = tuple(token_ids[end - length : end])
        if run in seen:
            return end
        seen.add(run)
    return None


def rounds_before(sample: Sample, end: int | None) -> list[Round]:
    """The sample's rounds that begin before token `end`; all without one."""
    return [r for r in sample.statistics.rounds if end is None or r.token_offset < end]


def _of_rounds(rounds: Sequence[Round]) -> Acceptance:
    drafted = [r for r in rounds if r.num_draft_tokens]
    width = max((r.num_draft_tokens for r in drafted), default=0)
    accepted_at = [sum(r.num_accepted_tokens > i for r in drafted) for i in range(width)]
    verified_at = [sum(min(r.num_accepted_tokens + 1, r.num_draft_tokens) > i for r in drafted) for i in range(width)]
    return _acceptance(len(drafted), sum(r.num_draft_tokens for r in drafted), accepted_at, verified_at)


def _acceptance(num_drafts: int, num_drafted: int, accepted_at: list[int], verified_at: list[int]) -> Acceptance:
    num_accepted = sum(accepted_at)
    conditional = [ratio(a, v) for a, v in zip(accepted_at, verified_at, strict=False)]
    return Acceptance(
        num_drafts=num_drafts,
        num_draft_tokens=num_drafted,
        num_accepted_tokens=num_accepted,
        acceptance_rate=ratio(num_accepted, num_drafted),
        mean_acceptance_length=round(1 + num_accepted / num_drafts, 4) if num_drafts else None,
        acceptance_rate_per_position=tuple(round(a / num_drafts, 4) for a in accepted_at) if num_drafts else (),
        conditional_acceptance_per_position=tuple(value for value in conditional if value is not None),
        alpha=ratio(num_accepted, sum(verified_at)),
    )
