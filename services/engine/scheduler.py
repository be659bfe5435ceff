"""Which sequences take part in a step, and who gives way when the KV pool is full. Shared by target and draft.

Owns: the order of a step, the size of its prefill, and the claims on the pool. Must not know: torch, clocks,
connections, items. Deterministic: the plan is a function of the demands, in their order, of the pool, and of the step
times that it was told.

A step takes, oldest first,
1. rows: running sequences that somebody waits for and that lack at most a round's tokens;
2. prefill chunks of sequences that somebody waits for, under a token budget. A prefill holds all its blocks before its
   first chunk or none, and where the oldest finds no room, no newer one starts;
3. prefill chunks that nobody waits for yet, with what is left of the budget and of the pool.

The budget is what keeps prefill from slowing down the rows: beside rows, or while rows may come at any moment, prefill
may make a step at most 1 + MAX_STRETCH times as long, but takes at least MIN_PREFILL_BUDGET tokens, so that it ends,
and at most twice the tokens that the estimates rest on: one that came out too low is corrected before it costs much.
The measure is the lesser of what these rows would take and what steps took before the prefill came: longer steps gather
more rows, which must not make them longer still. Before any step of rows alone was seen there is no measure: the rows
go alone once, since under load that never pauses they would otherwise never do so. Sequences that came together start
together: where all rows are of sequences with less than NUM_YOUNG_TOKENS tokens, prompts that fit into one step whole
may use the largest budget.

A sequence without blocks, new or preempted, first takes its longest cached prefix, at the moment of its first chunk.
Where rows find no room, the newest sequence outside the step is preempted: its blocks go, and it is computed again
later. Where the plan would come out empty, the first in line preempts older ones too: while somebody waits, there is a
step, and the first in line comes to its answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.common.values import MAX_DRAFT_TOKENS, Proposal
from services.engine.block_manager import BlockManager
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.step_times import StepTimes

DEFAULT_PREFILL_BUDGET = 512
MIN_PREFILL_BUDGET = 5
MAX_STRETCH = 0.6
NUM_YOUNG_TOKENS = 16
MAX_ROUND_LEN = MAX_DRAFT_TOKENS + 1
"""Tokens that one round can leave uncached; more than these are a prefill."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What an open sequence could do in the next step."""

    sequence: Sequence
    awaited: bool = False
    """Somebody waits for an answer."""
    wants_row: bool = False
    """A token is to come of it; otherwise only the prefix is to be cached, but for its last token."""
    proposal: Proposal | None = None
    """Verified together with the row."""
    deferred: bool = False
    """What is to be cached can wait until a row is wanted."""

    @property
    def num_tokens_to_cache(self) -> int:
        if self.deferred and not self.wants_row:
            return 0
        return self.sequence.num_uncached_tokens - (not self.wants_row)

    @property
    def is_row(self) -> bool:
        sequence = self.sequence
        return self.awaited and self.wants_row and 0 < sequence.num_cached >= len(sequence) - MAX_ROUND_LEN

    @property
    def max_len(self) -> int:
        """Tokens that the block table must cover when the demand is met."""
        return len(self.sequence) + (len(self.proposal.token_ids) if self.proposal else 0)


class Scheduler:
    """Plans steps over one pool; at most `prefill_budget` tokens of prefill a step, at least 1."""

    def __init__(
        self, blocks: BlockManager, prefill_budget: int = DEFAULT_PREFILL_BUDGET, times: StepTimes | None = None
    ) -> None:
        if prefill_budget < 1:
            raise ValueError(f"a step must have room to prefill: prefill_budget={prefill_budget}")
        self._blocks = blocks
        self._max_prefill_budget = prefill_budget
        self.times = times or StepTimes()

    def has_work(self, demands: Iterable[Demand]) -> bool:
        """Whether `plan` would yield a step."""
        is_first = True
        for demand in demands:
            if demand.num_tokens_to_cache > 0:
                if demand.awaited or self._holds_room(demand) or (is_first and self._has_room(demand)):
                    return True
                is_first = False  # newer ones do not overtake it
        return False

    def observe(self, works: list[Work], duration_ns: int) -> None:
        """Takes note of how long a step took."""
        num_rows = num_prefill_tokens = 0
        for work in works:
            if work.num_rows and work.num_new_tokens <= MAX_ROUND_LEN:
                num_rows += work.num_new_tokens + work.num_rows - 1
            else:
                num_prefill_tokens += work.num_computed_tokens
        self.times.observe(num_rows, num_prefill_tokens, duration_ns)

    def prefill_budget(self, num_rows: int) -> int:
        """Tokens of prefill for a step that `num_rows` rows take part in or may wait for; 0: nobody minds."""
        if not num_rows:
            return self._max_prefill_budget
        token_ns = self.times.prefill_token_ns
        step_ns = min(self.times.rows_ns(num_rows), self.times.mean_ns)
        affordable = int(MAX_STRETCH * step_ns / token_ns) if token_ns else self._max_prefill_budget
        affordable = min(affordable, 2 * self.times.num_tokens_known)
        return min(max(affordable, MIN_PREFILL_BUDGET), self._max_prefill_budget)

    def plan(
        self, demands: list[Demand], num_expected_rows: int = 0, sequences: list[Sequence] | None = None
    ) -> list[Work]:
        """The works of the next step, at most one a sequence; their block tables have room for them.

        `demands` are of the sequences with something to compute, oldest first; `sequences` all that are open, oldest
        first, as those without work may have to give up their blocks (None: the demands'). `num_expected_rows` are
        not there yet, but may be before the step ends.
        """
        sequences = [demand.sequence for demand in demands] if sequences is None else sequences
        rows = [demand for demand in demands if demand.is_row]
        awaited = [d for d in demands if d.awaited and not d.is_row and d.num_tokens_to_cache > 0]
        eager = [d for d in demands if not d.awaited and d.num_tokens_to_cache > 0]

        works = self._plan_rows(rows, sequences)
        if works and not self.times.knows_rows:
            return works
        all_have_room = len(works) == len(rows)
        budget = self.prefill_budget(sum(work.num_rows for work in works) or num_expected_rows)
        is_young = not num_expected_rows and all(demand.sequence.num_generated < NUM_YOUNG_TOKENS for demand in rows)
        whole_budget = self._max_prefill_budget if is_young else budget
        for demand in awaited + eager:
            fits = demand.num_tokens_to_cache <= whole_budget
            if budget <= 0 and not fits:
                break
            if not self._holds_room(demand) and not (all_have_room and self._has_room(demand)):
                all_have_room = False
            else:
                works.append(self._chunk(demand, whole_budget if fits else budget))
                budget -= works[-1].num_new_tokens
                whole_budget -= works[-1].num_new_tokens
        if not works and (first := next(iter(rows + awaited), None)):
            self._preempt_for(first, [sequence for sequence in sequences if sequence is not first.sequence])
            works.append(self._chunk(first, budget))
        return works

    def _plan_rows(self, rows: list[Demand], sequences: list[Sequence]) -> list[Work]:
        works: list[Work] = []
        for demand in rows:
            if demand.is_row:  # asked anew for each: an older row may have preempted it
                if not self._has_room(demand):
                    self._preempt_for(demand, sequences[sequences.index(demand.sequence) + 1 :])
                if self._has_room(demand):
                    works.append(self._chunk(demand, demand.sequence.num_uncached_tokens))
        return works

    def _holds_room(self, demand: Demand) -> bool:
        return len(demand.sequence.block_table) >= self._blocks.num_blocks_for(demand.max_len)

    def _has_room(self, demand: Demand) -> bool:
        return self._blocks.can_extend(demand.sequence, demand.max_len)

    def _preempt_for(self, demand: Demand, others: list[Sequence]) -> None:
        """Frees the newest of `others` until `demand` has room; none of them if all would not be enough."""
        num_missing = self._blocks.num_blocks_for(demand.max_len) - len(demand.sequence.block_table)
        if num_missing > self._blocks.num_free_blocks + self._blocks.num_freed_by(others):
            return
        while not self._has_room(demand):
            self._blocks.free(others.pop())

    def _chunk(self, demand: Demand, budget: int) -> Work:
        sequence = demand.sequence
        if not sequence.block_table:
            self._blocks.attach_prefix(sequence)
        self._blocks.extend(sequence, demand.max_len)
        num_tokens = demand.num_tokens_to_cache
        if not demand.wants_row or num_tokens > budget:
            return Work(sequence, min(num_tokens, budget))
        num_drafted = len(demand.proposal.token_ids) if demand.proposal else 0
        return Work(sequence, num_tokens, demand.proposal, num_rows=1 + num_drafted)
