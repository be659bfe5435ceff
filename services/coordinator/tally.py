"""What a coordinator counts while it runs generations.

Owns: what is counted, by model and draft pool, and how much of it there may be. Must not know: Prometheus, the wire.
Definitions as in services.coordinator.statistics, summed over generations; only what was emitted counts as a token.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from services.common.tally import LATENCY_BOUNDS_S, OTHER, SHORT_BOUNDS_S, Histogram
from services.common.values import MAX_DRAFT_TOKENS, FinishReason

MAX_KINDS = 64


class Kind(NamedTuple):
    """What tells generations apart in the metrics. `draft` is the draft pool's name, empty where there is none."""

    model: str
    draft: str


class GenerationTally:
    """Of all generations of one kind. Written by the event loop."""

    __slots__ = (
        "accepted_per_pos",
        "draft_ns",
        "e2e_s",
        "finished",
        "itl_s",
        "num_accepted_tokens",
        "num_draft_tokens",
        "num_drafts",
        "num_generated_tokens",
        "num_plain_rounds",
        "num_prompt_tokens",
        "num_rounds",
        "overhead_s",
        "tpot_s",
        "ttft_s",
        "verified_per_pos",
        "verify_ns",
    )

    def __init__(self) -> None:
        self.num_prompt_tokens = self.num_generated_tokens = 0
        self.num_rounds = self.num_plain_rounds = 0
        """Rounds with a proposal, and tokens decoded without one."""
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.accepted_per_pos = [0] * MAX_DRAFT_TOKENS
        self.verified_per_pos = [0] * MAX_DRAFT_TOKENS
        self.draft_ns = self.verify_ns = 0
        self.overhead_s = Histogram(SHORT_BOUNDS_S)
        self.ttft_s = Histogram(LATENCY_BOUNDS_S)
        self.itl_s = Histogram(SHORT_BOUNDS_S)
        self.tpot_s = Histogram(SHORT_BOUNDS_S)
        self.e2e_s = Histogram(LATENCY_BOUNDS_S)
        self.finished: Counter[FinishReason] = Counter()

    def round(self, *, draft_ns: int, verify_ns: int, overhead_ns: int) -> None:
        """A round's time, as the workers reported theirs."""
        self.num_rounds += 1
        self.draft_ns += draft_ns
        self.verify_ns += verify_ns
        self.overhead_s.observe(overhead_ns / 1e9)

    def draft(self, num_drafted: int, num_accepted: int) -> None:
        """A proposal of at least one token; positions behind the first rejection were not reached."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted
        for position in range(num_accepted):
            self.accepted_per_pos[position] += 1
        for position in range(min(num_accepted + 1, num_drafted)):
            self.verified_per_pos[position] += 1


class CoordinatorTally:
    """The tallies of all kinds of generation that came up. At most MAX_KINDS; what comes then shares one."""

    def __init__(self) -> None:
        self._tallies: dict[Kind, GenerationTally] = {}

    def of(self, kind: Kind) -> GenerationTally:
        """The one tally of this kind, from now on."""
        if kind not in self._tallies and len(self._tallies) >= MAX_KINDS:
            kind = Kind(OTHER, OTHER)
        return self._tallies.setdefault(kind, GenerationTally())

    @property
    def kinds(self) -> list[tuple[Kind, GenerationTally]]:
        """All of them, safe from any thread."""
        return list(self._tallies.items())
