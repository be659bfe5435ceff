"""The state of simulated sequences and workers, and which prompts share a step with which rows.

Owns: that state, what is known of who comes back when, and the share of a step that prefill gets, by the rules of
services.engine.hold and services.engine.scheduler. Must not know: events, network, questions of capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from services.cli.plan.hold import MAX_HOLD_MS, Away, Ready, held_until_ms
from services.cli.plan.setting import Times

GAP_WEIGHT = 0.125
DEVIATION_WEIGHT = 0.25
MIN_SLACK = 0.125
MIN_SLACK_MS = 0.2
MAX_PREFILL, MIN_PREFILL = 512, 8
MAX_STRETCH = 0.6
NUM_YOUNG_TOKENS = 16
MAX_ROUND_LEN = 17
STEP_DECAY = 0.98
EXPECTED_REACHES = 4


@dataclass(slots=True, eq=False)
class Sequence:
    """A place: one sequence that never ends, or one request after the other."""

    draft: Server
    target: Target
    num_missing: int = 0
    """Tokens still to be drafted for its round."""
    num_drafted: int = 0
    """Of the round under way; 0: it decodes."""
    num_uncached: int = 1
    """Tokens in front of its next row, with the row's own."""
    is_begun: bool = True
    """Some of its prompt is cached."""
    num_generated: float = 0.0
    num_left: float = float("inf")
    """Tokens of the request still to come."""
    began_ms: float = 0.0
    first_ms: float = 0.0
    num_rows: int = 0
    """Of its last verify."""
    left_ms: float | None = None
    """When its last verify ended; None while it is at the target."""
    gap_ms: float = 0.0
    """How long it is away, averaged; 0: never yet."""
    deviation_ms: float = 0.0

    @property
    def is_row(self) -> bool:
        """It takes part in every step; else it is a prompt that waits for its share."""
        return self.is_begun and self.num_uncached <= MAX_ROUND_LEN

    @property
    def reach_ms(self) -> float:
        return self.gap_ms + max(4 * self.deviation_ms, MIN_SLACK * self.gap_ms, MIN_SLACK_MS)

    @property
    def due_ms(self) -> float:
        """When it is back at the latest."""
        return 0.0 if self.left_ms is None or not self.gap_ms else self.left_ms + self.reach_ms

    @property
    def usual_ms(self) -> float:
        """When it is back in all but rare cases; it is away."""
        return (self.left_ms or 0.0) + self.gap_ms + 2 * self.deviation_ms

    def begin(self, now_ms: float, prompt_len: int, output_len: int) -> None:
        """A new request takes the place."""
        self.num_uncached, self.is_begun = prompt_len, False
        self.num_generated, self.num_left, self.began_ms = 0.0, float(output_len), now_ms
        self.num_drafted, self.left_ms, self.gap_ms, self.deviation_ms = 0, None, 0.0, 0.0

    def come_back(self, now_ms: float) -> None:
        if self.left_ms is None:
            return
        gap_ms, self.left_ms = now_ms - self.left_ms, None
        if not self.gap_ms:
            self.gap_ms, self.deviation_ms = gap_ms, gap_ms / 2
            return
        off_ms = gap_ms - self.gap_ms
        self.gap_ms += GAP_WEIGHT * off_ms
        self.deviation_ms += DEVIATION_WEIGHT * (abs(off_ms) - self.deviation_ms)


@dataclass(slots=True, eq=False)
class Server:
    """A worker: who waits, and until when it works."""

    waiting: list[Sequence] = field(default_factory=list)
    busy: bool = False
    busy_ms: float = 0.0
    woken: int = 0
    """Grows with every decision, so that the end of a hold that is over can be told."""


class Chunk(NamedTuple):
    """A sequence's part in a step: tokens computed, and rows among them; none of an unfinished prompt."""

    sequence: Sequence
    num_tokens: int
    num_rows: int


@dataclass(slots=True, eq=False)
class Target(Server):
    members: list[Sequence] = field(default_factory=list)
    held_since_ms: float | None = None
    coordinator_free_ms: float = 0.0
    """When its coordinator is done with what it has."""
    mean_ms: float = 0.0
    """Of steps without prefill."""
    weight: float = 0.0

    def step_ms(self, times: Times, chunks: list[Chunk]) -> float:
        num_rows = sum(chunk.num_rows for chunk in chunks)
        num_prefilled = sum(chunk.num_tokens for chunk in chunks) - num_rows
        return times.rows_ms(num_rows) + times.prefill_token_ms * num_prefilled

    def observe(self, times: Times, chunks: list[Chunk]) -> None:
        """Takes note of a step, if it was one without prefill."""
        if all(chunk.sequence.is_row for chunk in chunks):
            self.weight = STEP_DECAY * self.weight + 1
            self.mean_ms += (self.step_ms(times, chunks) - self.mean_ms) / self.weight

    def next_step(self, times: Times, now_ms: float) -> list[Chunk]:
        """All rows that wait, and as much of the prompts as may share the step with them."""
        rows = [sequence for sequence in self.waiting if sequence.is_row]
        chunks = [Chunk(s, s.num_uncached + s.num_drafted, 1 + s.num_drafted) for s in rows]
        if len(rows) == len(self.waiting) or (rows and not self.weight):
            return chunks
        num_expected = self._num_expected_rows(now_ms)
        budget = self._prefill_budget(times, sum(chunk.num_rows for chunk in chunks) or num_expected)
        is_young = not num_expected and all(sequence.num_generated < NUM_YOUNG_TOKENS for sequence in rows)
        whole_budget = MAX_PREFILL if is_young else budget
        for sequence in self.waiting:
            if sequence.is_row:
                continue
            fits = sequence.num_uncached <= whole_budget
            if budget <= 0 and not fits:
                break
            num_tokens = min(sequence.num_uncached, whole_budget if fits else budget)
            chunks.append(Chunk(sequence, num_tokens, int(num_tokens == sequence.num_uncached)))
            budget, whole_budget = budget - num_tokens, whole_budget - num_tokens
        return chunks

    def _num_expected_rows(self, now_ms: float) -> int:
        """Of sequences that are away, and that prefill may not slow down."""
        return sum(
            s.num_rows
            for s in self.members
            if s.left_ms is not None
            and s.num_generated >= NUM_YOUNG_TOKENS
            and now_ms - s.left_ms < EXPECTED_REACHES * (s.reach_ms if s.gap_ms else MAX_HOLD_MS / 2)
        )

    def _prefill_budget(self, times: Times, num_rows: int) -> int:
        if not num_rows or not times.prefill_token_ms:
            return MAX_PREFILL
        step_ms = min(times.rows_ms(num_rows), self.mean_ms)
        return min(max(int(MAX_STRETCH * step_ms / times.prefill_token_ms), MIN_PREFILL), MAX_PREFILL)

    def held_until_ms(self, times: Times, chunks: list[Chunk], now_ms: float) -> float:
        """When the step is to begin at the latest, if those who are due come back: now, where that does not pay."""
        num_rows = sum(chunk.num_rows for chunk in chunks)
        prefill_ms = self.step_ms(times, chunks) - times.rows_ms(num_rows)
        since_ms = now_ms if self.held_since_ms is None else self.held_since_ms
        away = [
            Away(s.usual_ms, s.due_ms, s.gap_ms, s.deviation_ms, s.num_rows) for s in self.members if s.due_ms > now_ms
        ]
        ready = Ready(since_ms, sum(chunk.num_rows > 1 for chunk in chunks), num_rows, prefill_ms)
        until_ms = held_until_ms(now_ms, ready, away, times.rows_ms)
        if until_ms > now_ms:
            self.held_since_ms = since_ms
        return until_ms
