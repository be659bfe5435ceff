"""The target worker's logic: verifies proposals and decodes, for many sequences in one step.

Owns: open sequences, their items in progress, and how a step's verdicts become tokens. Must not know: torch, the wire,
threads. Called by the engine thread alone (services.engine.engine_thread.Core).

A sequence has at most one Verify or Decode in progress. Its tokens are the committed ones: a verdict's tokens are
appended at once, and what was drafted and not accepted is truncated from the cache. The last token is always uncached,
so that the next step has a row to compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from services.common.errors import Aborted, InvalidArgument, OutriderError, ResourceExhausted, Unavailable
from services.common.items import Close, Decode, Identity, Open, Refused, TargetItem, TargetResult, Tokens, Verify
from services.common.tally import WorkerTally
from services.common.values import Proposal, WorkerLoad
from services.engine.block_manager import BlockManager, PrefixCacheStats
from services.engine.hold import HoldPolicy, Ready, Rhythm
from services.engine.pending import Pending
from services.engine.scheduler import DEFAULT_PREFILL_BUDGET, NUM_YOUNG_TOKENS, Demand, Scheduler
from services.engine.sequence import Sequence
from services.engine.sequence_table import Fence, Limits, SequenceTable, check_base_len
from services.engine.step import TargetModel, Verdict, Work

Results = list[tuple[int, TargetResult]]


@dataclass(slots=True, eq=False)
class _Slot:
    """An open sequence. `pending` is what it works on; `num_free_tokens` are left of a Decode.

    `fault` ended it while nobody waited for an answer: it holds no blocks and computes nothing; its next item is told.
    """

    sequence: Sequence
    connection: int
    rhythm: Rhythm = field(default_factory=Rhythm)
    pending: Pending[Verify] | Pending[Decode] | None = None
    num_free_tokens: int = 0
    fault: OutriderError | None = None

    @property
    def has_work(self) -> bool:
        """Whether there is something to compute. Asked of all sequences in every step, most of which may be idle."""
        return self.pending is not None or (self.sequence.num_uncached_tokens > 1 and self.fault is None)

    @property
    def demand(self) -> Demand:
        if self.pending is None:
            return Demand(self.sequence)
        item = self.pending.item
        proposal = item.proposal if isinstance(item, Verify) and item.proposal.token_ids else None
        return Demand(self.sequence, awaited=True, wants_row=True, proposal=proposal)


@dataclass(frozen=True, slots=True)
class _Step:
    """When a step ran and how many rows it had."""

    started_ns: int
    ended_ns: int
    num_rows: int


class TargetCore:
    """Serves Open, Verify, Decode and Close on one model.

    Open      starts prefilling the prefix, unanswered but for a refusal. A newer Open of a session replaces the older
              sequence, whose item in progress is refused as STALE.
    Verify    is answered by one Tokens with done=True: the accepted draft tokens, then the target's own. Draft tokens
              beyond the remaining budget are dropped first.
    Decode    with num_free_tokens = N > 0 is answered by one Tokens a token. Exactly one answer has done=True: that of
              the last token (the N-th, an end-of-sequence token, or the last of the budget), or, where the Decode is
              interrupted before that, one without tokens.
    Decode    with num_free_tokens = 0 interrupts the sequence's Decode at once, between steps. It has no answer of its
              own: if no Decode is running (any more), or the sequence is gone, it is ignored.
    Close     ends the sequence; an item in progress is not answered. Unknown ones are ignored. Full blocks of the
              base_len tokens that were committed in the end stay cached while there is room; where the connection
              breaks, those of the tokens that some item stood on.

    A KV pool that fills up refuses nobody: sequences are preempted and computed again. Timings of a Decode's later
    tokens count from the answer before.
    """

    def __init__(
        self,
        model: TargetModel,
        blocks: BlockManager,
        *,
        max_sequences: int,
        max_sequence_len: int,
        max_draft_tokens: int,
        prefill_budget: int = DEFAULT_PREFILL_BUDGET,
        clock: Callable[[], int] = time.monotonic_ns,
        tally: WorkerTally | None = None,
    ) -> None:
        self._tally = tally or WorkerTally()
        self._model = model
        self._blocks = blocks
        self._limits = Limits(max_sequences, max_sequence_len, max_draft_tokens, model.info.vocab_size)
        self._scheduler = Scheduler(blocks, prefill_budget)
        self._hold = HoldPolicy(self._scheduler.times)
        self._table: SequenceTable[_Slot] = SequenceTable(max_sequences, Fence(clock))
        self._clock = clock
        self._draining = False

    def handle(self, connection: int, items: Items[TargetItem], arrived_ns: int | None = None) -> Results:
        """Takes items in order; returns refusals, and the ends of interrupted Decodes."""
        arrived_ns = self._clock() if arrived_ns is None else arrived_ns
        results: Results = []
        for item in items:
            try:
                results += self._take(connection, item, arrived_ns)
            except OutriderError as error:
                results.append((connection, Refused(item.identity, error)))
        return results

    def disconnect(self, connection: int) -> None:
        """Ends the connection's sequences, unanswered, and frees their blocks."""
        for slot in self._table.slots:
            if slot.connection == connection:
                self._end(slot)

    def drain(self) -> None:
        """Refuses every Open from now on (Unavailable, DRAINING)."""
        self._draining = True

    def abandon(self, error: OutriderError) -> Results:
        """Ends every sequence; refuses what was in progress with `error`. Nothing stays cached."""
        results = [result for slot in self._table.slots for result in self._end(slot, error)]
        self._blocks.forget_cached()
        return results

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work(slot.demand for slot in self._table.slots if slot.has_work)

    @property
    def hold_s(self) -> float:
        """How long the next step is better held for sequences that are due back from drafting (engine.hold)."""
        if not (away := self._away):
            return 0.0
        now_ns = self._clock()
        return self._hold.hold_ns(now_ns, self._ready(now_ns), away) / 1e9

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        return self._blocks.prefix_cache_stats

    @property
    def load(self) -> WorkerLoad:
        return WorkerLoad(
            num_sequences=len(self._table),
            num_queued=sum(slot.pending is not None for slot in self._table.slots),
            num_used_blocks=self._blocks.num_used_blocks,
            num_blocks=self._blocks.num_blocks,
            draining=self._draining,
        )

    def check_integrity(self) -> None:
        """Raises IntegrityError where blocks and open sequences contradict each other."""
        self._blocks.check_integrity(slot.sequence for slot in self._table.slots)

    def step(self) -> Results:
        """Computes one step: rows of all sequences that somebody waits for, and prefill chunks."""
        slots, started_ns = self._table.slots, self._clock()
        num_expected_rows = self._num_expected_rows(started_ns)
        demands = [slot.demand for slot in slots if slot.has_work]
        works = self._scheduler.plan(demands, num_expected_rows, [slot.sequence for slot in slots])
        if not works:
            return []
        self._hold.stepped()
        verdicts = self._model.step(works)
        step = _Step(started_ns, self._clock(), sum(work.num_rows for work in works))
        self._scheduler.observe(works, step.ended_ns - started_ns)
        self._tally.step(
            num_sequences=len(works),
            num_rows=step.num_rows,
            num_prefill_tokens=sum(work.num_computed_tokens - work.num_rows for work in works),
            duration_ns=step.ended_ns - started_ns,
        )
        slot_of = {id(slot.sequence): slot for slot in slots}
        results: Results = []
        for work, verdict in zip(works, verdicts, strict=True):
            results += self._settle(slot_of[id(work.sequence)], work, verdict, step)
        return results

    def _take(self, connection: int, item: TargetItem, arrived_ns: int) -> Results:
        match item:
            case Open():
                return self._open(connection, item)
            case Verify():
                return self._verify(connection, item, arrived_ns)
            case Decode(num_free_tokens=0):
                return self._interrupt(connection, item.identity)
            case Decode():
                return self._decode(connection, item, arrived_ns)
            case Close():
                slot = self._table.get(item.identity.session_id)
                if slot and slot.sequence.identity.generation == item.identity.generation:
                    slot.sequence.confirm(item.identity.base_len)
                    self._end(slot)
                return []

    @property
    def _away(self) -> list[Rhythm]:
        """Of the sequences that were answered and are expected to ask again."""
        return [slot.rhythm for slot in self._table.slots if slot.rhythm.left_ns is not None]

    def _num_expected_rows(self, now_ns: int) -> int:
        """Rows that may arrive at any moment, of sequences that prefill may not slow down."""
        grown = (slot for slot in self._table.slots if slot.sequence.num_generated >= NUM_YOUNG_TOKENS)
        return sum(slot.rhythm.num_rows for slot in grown if slot.rhythm.is_expected(now_ns))

    def _ready(self, now_ns: int) -> Ready:
        """What the next step would hold. Asked again whenever somebody comes back, so it is quick about who is away."""
        ready, num_prefill_tokens = Ready(), 0
        for slot in self._table.slots:
            if not slot.has_work:
                continue
            demand = slot.demand
            if not demand.is_row:
                num_prefill_tokens += max(0, demand.num_tokens_to_cache)
            elif demand.proposal is None:
                ready.num_plain += 1
            else:
                ready.num_sequences += 1
                ready.num_rows += 1 + len(demand.proposal.token_ids)
                ready.num_tokens += slot.rhythm.num_tokens
        if not num_prefill_tokens:
            return ready
        budget = self._scheduler.prefill_budget(ready.num_rows + ready.num_plain or self._num_expected_rows(now_ns))
        ready.prefill_ns = min(num_prefill_tokens, budget) * (self._scheduler.times.prefill_token_ns or 0.0)
        return ready

    def _open(self, connection: int, item: Open) -> Results:
        if self._draining:
            raise Unavailable("DRAINING", "the worker is draining and opens no more sequences")
        self._limits.check_open(item)
        self._table.check_room(item.identity)
        new = Sequence.from_open(item)
        if new.max_len > self._limits.max_sequence_len:
            raise InvalidArgument(
                "INVALID_PARAMETER",
                f"max_new_tokens: {item.max_new_tokens} behind {len(new)} tokens, but a sequence has at most "
                f"{self._limits.max_sequence_len}",
                field="max_new_tokens",
            )
        if (num_blocks := self._blocks.num_blocks_for(new.max_len)) > self._blocks.num_blocks:
            raise ResourceExhausted(
                "TOO_LONG_FOR_POOL",
                f"{new.max_len} tokens need {num_blocks} blocks; the KV pool has {self._blocks.num_blocks}",
            )
        older = self._table.get(item.identity.session_id)
        results = self._end(older, Aborted("STALE", "the session has been opened anew")) if older else []
        self._table.add(_Slot(new, connection))
        return results

    def _verify(self, connection: int, item: Verify, arrived_ns: int) -> Results:
        slot = self._find_idle(connection, item.identity)
        proposal = item.proposal
        self._limits.check_num_draft_tokens("proposal.token_ids", len(proposal.token_ids))
        self._limits.check_token_ids("proposal.token_ids", proposal.token_ids)
        if proposal.rows is not None and len(proposal.rows) != len(proposal.token_ids):
            raise InvalidArgument(
                "INVALID_PARAMETER",
                f"proposal.rows: {len(proposal.rows)} rows for {len(proposal.token_ids)} tokens",
                field="proposal.rows",
            )
        kept = _cut(proposal, slot.sequence.num_remaining_tokens)
        slot.pending = Pending(Verify(item.identity, kept), arrived_ns)
        slot.rhythm.come_back(arrived_ns)
        return []

    def _decode(self, connection: int, item: Decode, arrived_ns: int) -> Results:
        if item.num_free_tokens < 0:
            raise InvalidArgument("INVALID_PARAMETER", "num_free_tokens: below 0", field="num_free_tokens")
        slot = self._find_idle(connection, item.identity)
        slot.pending, slot.num_free_tokens = Pending(item, arrived_ns), item.num_free_tokens
        slot.rhythm.come_back(arrived_ns)
        return []

    def _find_idle(self, connection: int, identity: Identity) -> _Slot:
        slot = self._table.find(identity, connection)
        if slot.fault is not None:
            self._end(slot)
            raise slot.fault
        if slot.pending is not None:
            raise Aborted("SESSION_BUSY", "the sequence's last item is still in progress")
        check_base_len(identity, len(slot.sequence))
        slot.sequence.confirm(identity.base_len)
        if not slot.sequence.num_remaining_tokens:
            raise InvalidArgument(
                "INVALID_PARAMETER",
                f"max_new_tokens: the sequence has reached its {slot.sequence.max_len} tokens",
                field="max_new_tokens",
            )
        return slot

    def _interrupt(self, connection: int, identity: Identity) -> Results:
        slot = self._table.get(identity.session_id)
        if slot is None or slot.connection != connection or slot.sequence.identity.generation != identity.generation:
            return []
        pending = slot.pending
        if pending is None or not isinstance(pending.item, Decode):
            return []
        slot.pending = None
        cut = Tokens(
            identity=pending.item.identity.at(len(slot.sequence)),
            token_ids=(),
            num_accepted_tokens=0,
            num_draft_tokens=0,
            done=True,
            timings=pending.timings(self._clock()),
            num_cached_tokens=slot.sequence.num_cached,
        )
        return [(connection, cut)]

    def _end(self, slot: _Slot, error: OutriderError | None = None, keeps_cache: bool = True) -> Results:
        """Removes a sequence, whose committed prefix stays cached; with an error, refuses its item in progress."""
        self._table.remove(slot)
        if keeps_cache:
            self._blocks.share(slot.sequence)
        self._blocks.free(slot.sequence)
        if error is None or slot.pending is None:
            return []
        return [(slot.connection, Refused(slot.pending.item.identity, error, slot.pending.timings(self._clock())))]

    def _settle(self, slot: _Slot, work: Work, verdict: Verdict | OutriderError | None, step: _Step) -> Results:
        """Takes a work's outcome into the sequence, and answers its item."""
        if isinstance(verdict, OutriderError):
            if slot.pending is not None:
                return self._end(slot, verdict, keeps_cache=False)
            slot.fault = verdict
            self._blocks.free(slot.sequence)
            return []
        if slot.pending is not None:
            slot.pending.add_step(step.started_ns, step.ended_ns)
        if verdict is None:
            slot.sequence.num_cached += work.num_new_tokens
            self._blocks.share(slot.sequence)
            return []
        if slot.pending is None:
            raise RuntimeError("a verdict for a sequence that nobody waits for")
        base_len = len(slot.sequence)
        self._append(slot.sequence, verdict)
        done = self._is_done(slot, verdict)
        tokens = Tokens(
            identity=slot.pending.item.identity.at(base_len),
            token_ids=verdict.token_ids,
            num_accepted_tokens=verdict.num_accepted_tokens,
            num_draft_tokens=len(work.drafted),
            done=done,
            log_probs=verdict.log_probs,
            top_log_probs=verdict.top_log_probs,
            rows_replaced=verdict.rows_replaced,
            timings=slot.pending.timings(step.ended_ns),
            num_cached_tokens=slot.sequence.num_cached,
            step_ns=step.ended_ns - step.started_ns,
            step_rows=step.num_rows,
            features=verdict.features,
        )
        self._tally.answered(len(verdict.token_ids), tokens.timings.queue_ns)
        slot.pending.answered(step.ended_ns)
        if done:
            self._finish(slot, work, verdict, step.ended_ns)
        return [(slot.connection, tokens)]

    def _append(self, grown: Sequence, verdict: Verdict) -> None:
        """Appends a verdict's tokens. All before the last one are accepted drafts, so they are cached."""
        grown.tokens += verdict.token_ids
        grown.num_cached = len(grown) - 1
        self._blocks.truncate(grown, grown.num_cached)
        self._blocks.share(grown)

    def _finish(self, slot: _Slot, work: Work, verdict: Verdict, now_ns: int) -> None:
        """Takes note that the item is answered, and whether another one is to be expected."""
        slot.pending = None
        ended = verdict.token_ids[-1] in slot.sequence.eos_token_ids or not slot.sequence.num_remaining_tokens
        if work.drafted and not ended:
            slot.rhythm.leave(now_ns, work.num_rows, len(verdict.token_ids))

    def _is_done(self, slot: _Slot, verdict: Verdict) -> bool:
        if slot.pending is not None and isinstance(slot.pending.item, Verify):
            return True
        slot.num_free_tokens -= len(verdict.token_ids)
        ended = verdict.token_ids[-1] in slot.sequence.eos_token_ids
        return ended or slot.num_free_tokens <= 0 or not slot.sequence.num_remaining_tokens


def _cut(proposal: Proposal, max_tokens: int) -> Proposal:
    """The proposal's first `max_tokens` tokens."""
    if len(proposal.token_ids) <= max_tokens:
        return proposal
    rows = proposal.rows[:max_tokens] if proposal.rows is not None else None
    return Proposal(proposal.proposal_id, proposal.token_ids[:max_tokens], rows)
