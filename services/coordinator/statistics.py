"""What a generation took: counts and times.

Owns: how rounds add up, and the JSON that the session's record holds. Must not know: protobuf, sessions.
Times are in milliseconds of the monotonic clock; they, rounds and drafts are of one stream's part of the generation.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from services.common.items import Proposed, Tokens
from services.common.values import MAX_DRAFT_TOKENS, FinishReason
from services.coordinator.tally import GenerationTally


class RoundStatistics(NamedTuple):
    """As in RoundStatistics of the wire contract."""

    token_offset: int
    num_draft_tokens: int
    num_accepted_tokens: int
    draft_ms: float
    verify_ms: float


@dataclass(frozen=True, slots=True)
class GenerationStatistics:
    """As in GenerationStatistics of the wire contract."""

    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: tuple[int, ...] = ()
    num_verified_tokens_per_pos: tuple[int, ...] = ()
    num_rounds: int = 0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    overhead_ms: tuple[float, ...] = ()
    lossy: bool = False
    num_replaced_tokens: int = 0
    num_replaced_rows: int = 0
    draft: str = ""
    rounds: tuple[RoundStatistics, ...] = ()

    def to_json(self) -> str:
        return json.dumps({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def from_json(cls, text: str) -> GenerationStatistics:
        values: dict[str, Any] = json.loads(text)
        for name in ("num_accepted_tokens_per_pos", "num_verified_tokens_per_pos", "overhead_ms"):
            values[name] = tuple(values[name])
        values["rounds"] = tuple(RoundStatistics(*fields) for fields in values.get("rounds", ()))
        return cls(**values)


@dataclass(slots=True)
class DraftCounts:
    """What became of the proposals of one draft pool, over all generations."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def add(self, num_drafted: int, num_accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted


class StatisticsCollector:
    """Gathers them while the generation runs. `arrived_ns` is when the request came in, by time.perf_counter_ns.

    `draft` names the pool that drafts for it, and what it drafts is added to `draft_counts`. Everything is added to
    `tally` as it comes.
    """

    def __init__(
        self,
        *,
        arrived_ns: int,
        lossy: bool,
        num_replaced_tokens: int,
        draft: str = "",
        draft_counts: DraftCounts | None = None,
        tally: GenerationTally | None = None,
    ) -> None:
        self._tally = tally or GenerationTally()
        self._arrived_ns = arrived_ns
        self._lossy = lossy
        self._num_replaced_tokens = num_replaced_tokens
        self._draft = draft
        self._draft_counts = draft_counts or DraftCounts()
        self._num_rounds = 0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0
        self._accepted = [0] * MAX_DRAFT_TOKENS
        self._verified = [0] * MAX_DRAFT_TOKENS
        self._ttft_ns = 0
        self._emitted_ns = 0
        self._num_later_tokens = 0
        self._draft_ns = 0
        self._verify_ns = 0
        self._overhead_ns: list[int] = []
        self._num_replaced_rows = 0
        self._rounds: list[RoundStatistics] = []

    @property
    def has_emitted(self) -> bool:
        """Whether a token has gone out."""
        return self._ttft_ns > 0

    def started(self, num_prompt_tokens: int) -> None:
        """To be called once, when the generation begins."""
        self._tally.num_prompt_tokens += num_prompt_tokens

    def emitted(self, num_tokens: int) -> None:
        """To be called when tokens go out, before they do. Without tokens it does not count."""
        if not num_tokens:
            return
        now_ns = time.perf_counter_ns()
        self._tally.num_generated_tokens += num_tokens
        if not self._ttft_ns:
            self._ttft_ns = now_ns - self._arrived_ns
            self._tally.ttft_s.observe(self._ttft_ns / 1e9)
        else:
            self._num_later_tokens += num_tokens
            self._tally.itl_s.observe((now_ns - self._emitted_ns) / 1e9)
        self._emitted_ns = now_ns

    def finished(self, reason: FinishReason) -> None:
        """To be called once, when the generation has ended as it should."""
        tally = self._tally
        tally.finished[reason] += 1
        tally.e2e_s.observe((time.perf_counter_ns() - self._arrived_ns) / 1e9)
        if self._num_later_tokens:
            first_ns = self._arrived_ns + self._ttft_ns
            tally.tpot_s.observe((self._emitted_ns - first_ns) / self._num_later_tokens / 1e9)

    def decoded(self, num_tokens: int, verify_ns: int) -> None:
        """Plainly decoded tokens and the target's own time for them."""
        self._num_rounds += num_tokens
        self._verify_ns += verify_ns
        self._tally.num_plain_rounds += num_tokens

    def round(self, proposed: Proposed, verified: Tokens, num_kept: int, wall_ns: int, token_offset: int) -> None:
        """A round, of whose tokens `num_kept` were left by the trim; the first is the generation's `token_offset`-th.

        What was accepted but trimmed away is not counted as accepted, nor as drafted: it never became output.
        Position i was reached if everything before it was accepted: later positions are censored.
        """
        num_accepted = min(verified.num_accepted_tokens, num_kept)
        trimmed = num_kept < len(verified.token_ids)
        num_drafted = (
            num_accepted if trimmed and num_kept <= verified.num_accepted_tokens else verified.num_draft_tokens
        )
        draft_ns, verify_ns = proposed.timings.total_ns, verified.timings.total_ns
        overhead_ns = max(0, wall_ns - draft_ns - verify_ns)
        self._tally.round(draft_ns=draft_ns, verify_ns=verify_ns, overhead_ns=overhead_ns)
        self._num_rounds += 1
        self._draft_ns += draft_ns
        self._verify_ns += verify_ns
        self._overhead_ns.append(overhead_ns)
        self._num_replaced_rows += verified.rows_replaced
        self._rounds.append(RoundStatistics(token_offset, num_drafted, num_accepted, draft_ns / 1e6, verify_ns / 1e6))
        if verified.num_draft_tokens:
            self._num_drafts += 1
            self._num_draft_tokens += num_drafted
            self._num_accepted_tokens += num_accepted
            self._draft_counts.add(num_drafted, num_accepted)
            self._tally.draft(num_drafted, num_accepted)
            for position in range(min(num_accepted + 1, num_drafted)):
                self._verified[position] += 1
                self._accepted[position] += position < num_accepted

    def snapshot(self, *, num_prompt_tokens: int, num_generated_tokens: int) -> GenerationStatistics:
        """The figures up to now."""
        now_ns = time.perf_counter_ns() - self._arrived_ns
        width = max((i + 1 for i, n in enumerate(self._verified) if n), default=0)
        return GenerationStatistics(
            num_prompt_tokens=num_prompt_tokens,
            num_generated_tokens=num_generated_tokens,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_accepted_tokens_per_pos=tuple(self._accepted[:width]),
            num_verified_tokens_per_pos=tuple(self._verified[:width]),
            num_rounds=self._num_rounds,
            ttft_ms=(self._ttft_ns or now_ns) / 1e6,
            total_ms=now_ns / 1e6,
            draft_ms=self._draft_ns / 1e6,
            verify_ms=self._verify_ns / 1e6,
            overhead_ms=tuple(round(ns / 1e6, 4) for ns in self._overhead_ns),
            lossy=self._lossy,
            num_replaced_tokens=self._num_replaced_tokens,
            num_replaced_rows=self._num_replaced_rows,
            draft=self._draft,
            rounds=tuple(self._rounds),
        )
