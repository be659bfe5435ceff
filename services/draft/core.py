"""The draft worker's logic: proposes tokens for many sequences, a step of the drafter at a time.

Owns: open sequences, their items in progress, and how commits meet what was drafted. Must not know: torch, the wire,
threads, how tokens are drafted (services.engine.drafters). Called by the engine thread alone (engine_thread.Core).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from services.common.errors import Aborted, OutriderError, ResourceExhausted, Unavailable
from services.common.items import Close, DraftItem, DraftResult, Open, Opened, Propose, Proposed, Refused
from services.common.tally import WorkerTally
from services.common.values import WorkerLoad
from services.engine.block_manager import PrefixCacheStats
from services.engine.drafters.base import Draft, Drafter
from services.engine.pending import Pending
from services.engine.sequence import Sequence
from services.engine.sequence_table import Fence, Limits, SequenceTable, check_base_len, check_max_len

Results = list[tuple[int, DraftResult]]


@dataclass(slots=True, eq=False)
class _Slot:
    """An open sequence and its items in progress."""

    draft: Draft
    sequence: Sequence
    connection: int
    opening: Pending[Open] | None = None
    proposing: Pending[Propose] | None = None

    @property
    def pending(self) -> list[Pending[Open] | Pending[Propose]]:
        return [pending for pending in (self.opening, self.proposing) if pending is not None]


class DraftCore:
    """Serves Open, Propose and Close with one drafter.

    Open      is answered by Opened once the prefix is processed. A newer Open of a session replaces the older sequence,
              whose items in progress are refused as STALE.
    Propose   commits its tokens, keeps what was drafted as far as it agrees with them, and is answered by Proposed with
              at most num_draft_tokens tokens: fewer behind an end-of-sequence token, before the end of the budget, or
              where the drafter has no more. With 0 it only takes note and is not answered. It may come while an older
              Propose of the sequence is in progress, which is then refused as STALE.
    Close     ends the sequence; items in progress are not answered. Unknown ones are ignored. The full blocks of what
              was committed stay cached while there is room, drafted tokens never do.

    A sequence may have fewer tokens here than its budget says: drafts end where `max_sequence_len` is reached.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        max_sequences: int,
        max_sequence_len: int,
        max_draft_tokens: int,
        clock: Callable[[], int] = time.monotonic_ns,
        tally: WorkerTally | None = None,
    ) -> None:
        self._tally = tally or WorkerTally()
        self._drafter = drafter
        vocab_size = drafter.info.vocab_size if drafter.info else None
        self._limits = Limits(max_sequences, max_sequence_len, max_draft_tokens, vocab_size)
        self._table: SequenceTable[_Slot] = SequenceTable(max_sequences, Fence(clock))
        self._clock = clock
        self._draining = False

    def handle(self, connection: int, items: Items[DraftItem], arrived_ns: int | None = None) -> Results:
        """Takes items in order; returns refusals, and what needs no step."""
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
        for pool in self._drafter.pools([]):
            pool.blocks.forget_cached()
        return results

    @property
    def has_work(self) -> bool:
        return self._drafter.has_work([slot.draft for slot in self._table.slots])

    @property
    def hold_s(self) -> float:
        """0: a draft's step is never held."""
        return 0.0

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Of the drafter's pool; zeros for a drafter without."""
        blocks = self._drafter.blocks
        return blocks.prefix_cache_stats if blocks else PrefixCacheStats(0, 0)

    @property
    def load(self) -> WorkerLoad:
        blocks = self._drafter.blocks
        return WorkerLoad(
            num_sequences=len(self._table),
            num_queued=sum((s.opening is not None) + (s.proposing is not None) for s in self._table.slots),
            num_used_blocks=blocks.num_used_blocks if blocks else 0,
            num_blocks=blocks.num_blocks if blocks else 0,
            draining=self._draining,
        )

    def check_integrity(self) -> None:
        """Raises IntegrityError where blocks and open sequences contradict each other."""
        for pool in self._drafter.pools([slot.draft for slot in self._table.slots]):
            pool.blocks.check_integrity(pool.sequences)

    def step(self) -> Results:
        """Computes one step of the drafter; returns what it completed."""
        slots = self._table.slots
        started_ns = self._clock()
        taking_part = {id(draft) for draft in self._drafter.step([slot.draft for slot in slots])}
        ended_ns = self._clock()
        num_sequences = len(taking_part)
        self._tally.step(
            num_sequences=num_sequences, num_rows=num_sequences, num_prefill_tokens=0, duration_ns=ended_ns - started_ns
        )
        results: Results = []
        for slot in slots:
            if id(slot.draft) in taking_part:
                for pending in slot.pending:
                    pending.add_step(started_ns, ended_ns)
                results += self._answer(slot, ended_ns)
        return results

    def _take(self, connection: int, item: DraftItem, arrived_ns: int) -> Results:
        match item:
            case Open():
                return self._open(connection, item, arrived_ns)
            case Propose():
                return self._propose(connection, item, arrived_ns)
            case Close():
                slot = self._table.get(item.identity.session_id)
                if slot and slot.sequence.identity.generation == item.identity.generation:
                    self._end(slot)
                return []

    def _open(self, connection: int, item: Open, arrived_ns: int) -> Results:
        if self._draining:
            raise Unavailable("DRAINING", "the worker is draining and opens no more sequences")
        self._limits.check_open(item)
        self._table.check_room(item.identity)
        new = Sequence.from_open(item)
        new.max_len = min(new.max_len, self._limits.max_sequence_len)
        blocks = self._drafter.blocks
        if blocks and (num_blocks := blocks.num_blocks_for(new.max_len)) > blocks.num_blocks:
            raise ResourceExhausted(
                "TOO_LONG_FOR_POOL",
                f"{new.max_len} tokens need {num_blocks} blocks; the KV pool has {blocks.num_blocks}",
            )
        older = self._table.get(item.identity.session_id)
        results = self._end(older, Aborted("STALE", "the session has been opened anew")) if older else []
        slot = _Slot(Draft(new), new, connection, opening=Pending(item, arrived_ns))
        self._drafter.open(slot.draft)
        self._table.add(slot)
        return results + self._answer(slot, self._clock())

    def _propose(self, connection: int, item: Propose, arrived_ns: int) -> Results:
        slot = self._table.find(item.identity, connection)
        draft = slot.draft
        check_base_len(item.identity, draft.sequence.num_committed + len(item.committed_tokens))
        check_max_len(item.identity, draft.sequence.max_len)
        self._limits.check_num_draft_tokens("num_draft_tokens", item.num_draft_tokens)
        self._limits.check_token_ids("committed_tokens", item.committed_tokens)
        results: Results = []
        if slot.proposing is not None:
            overtaken = Aborted("STALE", "a later commit has overtaken the proposal in progress")
            results.append((slot.connection, _refused(slot.proposing, overtaken, self._clock())))
            slot.proposing = None
        draft.features = item.features
        self._drafter.commit(draft, draft.commit(item.committed_tokens))
        if item.num_draft_tokens:
            draft.request(item.num_draft_tokens)
            slot.proposing = Pending(item, arrived_ns)
        return results + self._answer(slot, self._clock())

    def _answer(self, slot: _Slot, now_ns: int) -> Results:
        """Answers of the slot's items that are complete."""
        results: Results = []
        num_cached = slot.sequence.num_cached
        if (opening := slot.opening) and self._drafter.is_ready(slot.draft):
            slot.opening = None
            opened = Opened(opening.item.identity, opening.timings(now_ns), num_cached)
            results.append((slot.connection, opened))
        if (proposing := slot.proposing) and not slot.draft.num_missing_tokens:
            slot.proposing = None
            proposal = slot.draft.proposal(proposing.item.proposal_id)
            proposed = Proposed(proposing.item.identity, proposal, proposing.timings(now_ns), num_cached)
            results.append((slot.connection, proposed))
            self._tally.answered(len(proposal.token_ids), proposed.timings.queue_ns)
        slot.draft.awaited = bool(slot.pending)
        return results

    def _end(self, slot: _Slot, error: OutriderError | None = None) -> Results:
        """Removes a sequence and frees what it holds; with an error, refuses its items in progress."""
        self._table.remove(slot)
        self._drafter.close(slot.draft)
        if error is None:
            return []
        now_ns = self._clock()
        return [(slot.connection, _refused(pending, error, now_ns)) for pending in slot.pending]


def _refused(pending: Pending[Open] | Pending[Propose], error: OutriderError, now_ns: int) -> Refused:
    return Refused(pending.item.identity, error, pending.timings(now_ns))
