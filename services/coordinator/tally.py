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
_POSITIONS = range(MAX_DRAFT_TOKENS)


class Kind(NamedTuple):
    """What tells generations apart in the metrics. `draft` is the draft pool's name, empty where there is none."""

    model: str
    draft: str


class GenerationTally:
    """Of all generations of one kind. Written by the event loop."""

    __slots__ = (
        "draft_ns",
        "e2e_s",
        "finished",
        "itl_s",
        "num_generated_tokens",
        "num_plain_rounds",
        "num_prompt_tokens",
        "num_rounds",
        "outcomes",
        "overhead_s",
        "tpot_s",
        "ttft_s",
        "verify_ns",
    )

    def __init__(self) -> None:
        self.num_prompt_tokens = self.num_generated_tokens = 0
        self.num_rounds = self.num_plain_rounds = 0
        """Rounds with a proposal, and tokens decoded without one."""
        self.outcomes = [[0] * (num_drafted + 1) for num_drafted in range(MAX_DRAFT_TOKENS + 1)]
        """How many proposals of i tokens had j of them accepted: all that is counted of drafts follows from it."""
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
        """A proposal of at least one token."""
        self.outcomes[num_drafted][num_accepted] += 1

    @property
    def num_drafts(self) -> int:
        return sum(map(sum, self.outcomes))

    @property
    def num_draft_tokens(self) -> int:
        return sum(num_drafted * sum(counts) for num_drafted, counts in enumerate(self.outcomes))

    @property
    def num_accepted_tokens(self) -> int:
        return sum(num_accepted * n for counts in self.outcomes for num_accepted, n in enumerate(counts))

    @property
    def accepted_per_pos(self) -> list[int]:
        """Proposals whose tokens up to this position were accepted."""
        return [sum(sum(counts[position + 1 :]) for counts in self.outcomes) for position in _POSITIONS]

    @property
    def verified_per_pos(self) -> list[int]:
        """Proposals with a token at this position and everything before it accepted: the others did not reach it."""
        return [sum(sum(counts[position:]) for counts in self.outcomes[position + 1 :]) for position in _POSITIONS]


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
