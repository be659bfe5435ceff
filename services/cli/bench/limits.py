"""What limits the speed-up: a round's time by part, and the speed-up if each part were free.

Owns: that account. Must not know: how samples were taken. Pure.

    speed-up of the decode phase = tokens a round * plain ms a token / (draft + verify + overhead) ms a round

Draft and verify are the workers' own reported times, queueing included; overhead is the rest of a round: wire, the
coordinator, the store. A verify step is never free: its bound is a plain decode step, that is, further rows at no cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.cli.bench.sample import Sample
from services.client import Round


@dataclass(frozen=True, slots=True)
class Limits:
    """Means over all rounds, those without a draft included. `speedup` is the account's own, not the measured one."""

    num_rounds: int
    tokens_per_round: float
    mean_draft_len: float
    plain_ms_per_token: float
    draft_ms: float
    verify_ms: float
    overhead_ms: float
    speedup: float
    speedup_if_draft_free: float
    speedup_if_extra_rows_free: float
    speedup_if_overhead_free: float
    speedup_if_all_free: float
    speedup_if_all_accepted: float

    @property
    def round_ms(self) -> float:
        return self.draft_ms + self.verify_ms + self.overhead_ms

    @property
    def shares(self) -> dict[str, float]:
        """Share of a round's time of each part."""
        parts = {"draft": self.draft_ms, "verify": self.verify_ms, "overhead": self.overhead_ms}
        return {name: round(ms / self.round_ms, 4) if self.round_ms else 0.0 for name, ms in parts.items()}


def limits_of(samples: Iterable[Sample], plain_ms_per_token: float | None) -> Limits | None:
    """Of speculative samples. None where there were no rounds, or plain decoding was not measured."""
    rounds: list[Round] = []
    tokens, overhead_ms = 0, 0.0
    for sample in samples:
        rounds += sample.statistics.rounds
        overhead_ms += sum(sample.statistics.overhead_ms)
        tokens += sum(
            min(r.num_accepted_tokens + 1, sample.num_tokens - r.token_offset) for r in sample.statistics.rounds
        )
    if not rounds or not plain_ms_per_token:
        return None
    count = len(rounds)
    length, drafted = tokens / count, sum(r.num_draft_tokens for r in rounds) / count
    draft, verify = sum(r.draft_ms for r in rounds) / count, sum(r.verify_ms for r in rounds) / count
    overhead = overhead_ms / count
    step = min(verify, plain_ms_per_token)

    def speedup(tokens_per_round: float, round_ms: float) -> float:
        return round(tokens_per_round * plain_ms_per_token / round_ms, 4) if round_ms else 0.0

    return Limits(
        num_rounds=count,
        tokens_per_round=round(length, 4),
        mean_draft_len=round(drafted, 4),
        plain_ms_per_token=plain_ms_per_token,
        draft_ms=round(draft, 4),
        verify_ms=round(verify, 4),
        overhead_ms=round(overhead, 4),
        speedup=speedup(length, draft + verify + overhead),
        speedup_if_draft_free=speedup(length, verify + overhead),
        speedup_if_extra_rows_free=speedup(length, draft + step + overhead),
        speedup_if_overhead_free=speedup(length, draft + verify),
        speedup_if_all_free=speedup(length, step),
        speedup_if_all_accepted=speedup(1 + drafted, draft + verify + overhead),
    )
