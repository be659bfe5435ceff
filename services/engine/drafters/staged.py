"""Drafts in two stages: a smaller drafter drafts for a model, which verifies that before it proposes to the target.

Owns: the rounds between the two stages. Must not know: torch, how either stage drafts or verifies.

    proposal in progress    [ committed )[ verified by the model )[ drafted by the smaller )
                            the model's sequence ................)
                            the smaller drafter's sequence ..............................)

A round adds what the model accepts of the smaller drafter's tokens, and one of the model's own; rounds go on until the
proposal is complete. To the smaller drafter what the model accepted is not committed: the target may still refuse it.
The model's tokens are those that it would draft alone: equal under greedy and coupled verification, and under rejection
distributed as the rows that come with them (services.engine.draft_verifier). Drafts of drafts: Spector and Re 2023,
"Accelerating LLM inference with staged speculative decoding"; Chen et al. 2024, "Cascade speculative drafting for even
faster LLM inference".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from services.common.values import ModelInfo
from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Draft, Drafter, Pool
from services.engine.scheduler import DEFAULT_PREFILL_BUDGET, MAX_ROUND_LEN, Demand, Scheduler
from services.engine.sequence import Sequence
from services.engine.step import TargetModel, Verdict

STAGED = "staged"


@dataclass(slots=True, eq=False)
class _Inner:
    """The smaller drafter's side of a draft. Its sequence begins with the model's."""

    draft: Draft
    asked: bool = False
    """A round is in progress."""

    @property
    def is_drafting(self) -> bool:
        return self.asked and self.draft.num_missing_tokens > 0


class StagedDrafter:
    """The Drafter over a smaller drafter and a model that verifies (services.engine.drafters.base.Drafter).

    `num_draft_tokens` is the longest inner proposal; the model's rounds fill what is asked for, whatever comes of them.
    """

    def __init__(
        self,
        smaller: Drafter,
        model: TargetModel,
        blocks: BlockManager,
        *,
        num_draft_tokens: int,
        prefill_budget: int = DEFAULT_PREFILL_BUDGET,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        if num_draft_tokens < 1:
            raise ValueError(f"an inner proposal has tokens: num_draft_tokens={num_draft_tokens}")
        self._smaller = smaller
        self._model = model
        self._blocks = blocks
        self._num_draft_tokens = num_draft_tokens
        self._scheduler = Scheduler(blocks, prefill_budget)
        self._clock = clock
        self._inners: dict[Draft, _Inner] = {}

    @property
    def kind(self) -> str:
        return STAGED

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @property
    def blocks(self) -> BlockManager:
        return self._blocks

    def pools(self, drafts: list[Draft]) -> list[Pool]:
        inner = self._smaller.pools([self._inners[draft].draft for draft in drafts])
        return [Pool(self._blocks, [draft.sequence for draft in drafts]), *inner]

    def open(self, draft: Draft) -> None:
        own = replace(draft.sequence, tokens=list(draft.sequence.tokens), block_table=[], block_hashes=[])
        inner = self._inners[draft] = _Inner(Draft(own))
        self._smaller.open(inner.draft)

    def commit(self, draft: Draft, num_kept: int) -> None:
        """Cuts both caches; the model's last token stays uncached, so that its next step has a row to compute."""
        self._blocks.truncate(draft.sequence, min(num_kept, len(draft.sequence) - 1))
        self._begin_round(draft)

    def close(self, draft: Draft) -> None:
        self._smaller.close(self._inners.pop(draft).draft)
        self._blocks.share(draft.sequence)
        self._blocks.free(draft.sequence)

    def is_ready(self, draft: Draft) -> bool:
        return draft.sequence.num_uncached_tokens <= 1 and self._smaller.is_ready(self._inners[draft].draft)

    def has_work(self, drafts: list[Draft]) -> bool:
        if any(draft.num_missing_tokens for draft in drafts):
            return True
        return self._smaller.has_work(self._inner_drafts(drafts)) or self._scheduler.has_work(self._demands(drafts))

    def step(self, drafts: list[Draft]) -> list[Draft]:
        """A step of the smaller drafter; one of the model too, unless a draft is about to join that one."""
        for draft in drafts:
            self._ask(draft)
        inner_drafts = self._inner_drafts(drafts)
        drafted = {id(inner) for inner in self._smaller.step(inner_drafts)}
        taking_part = [d for d, inner in zip(drafts, inner_drafts, strict=True) if id(inner) in drafted]
        if any(self._inners[draft].is_drafting for draft in taking_part):
            return taking_part
        return taking_part + self._verify(drafts)

    def _ask(self, draft: Draft) -> None:
        """Has the smaller drafter draft for a proposal in progress; the model adds one token of its own at least."""
        inner = self._inners[draft]
        if draft.num_missing_tokens and not inner.asked:
            inner.asked = True
            inner.draft.request(min(self._num_draft_tokens, draft.num_missing_tokens - 1))

    def _inner_drafts(self, drafts: list[Draft]) -> list[Draft]:
        """The smaller drafter's, told who waits."""
        inners = [self._inners[draft].draft for draft in drafts]
        for draft, inner in zip(drafts, inners, strict=True):
            inner.awaited, inner.deferred = draft.awaited, draft.deferred
        return inners

    def _verify(self, drafts: list[Draft]) -> list[Draft]:
        """One forward of the model: a round's verdict for each draft whose inner proposal is complete, and prefill."""
        num_expected_rows = sum(not d.awaited and (d.deferred or self.is_ready(d)) for d in drafts)
        works = self._scheduler.plan(self._demands(drafts), num_expected_rows)
        if not works:
            return []
        started_ns = self._clock()
        verdicts = self._model.step(works)
        self._scheduler.observe(works, self._clock() - started_ns)
        draft_of = {id(draft.sequence): draft for draft in drafts}
        taking_part = [draft_of[id(work.sequence)] for work in works]
        for draft, work, verdict in zip(taking_part, works, verdicts, strict=True):
            if isinstance(verdict, Verdict):
                self._take(draft, verdict)
            elif work.num_rows:  # an error: what others do not read has been cleared, and is computed again
                draft.end()
                self._blocks.truncate(draft.sequence, draft.sequence.num_shared_blocks * self._blocks.block_size)
            else:  # even after an error, or a fault that stays would be computed for ever
                draft.sequence.num_cached += work.num_new_tokens
            self._blocks.share(draft.sequence)
        return taking_part

    def _take(self, draft: Draft, verdict: Verdict) -> None:
        """Appends a verdict's tokens. All before the last one are accepted drafts, so they are cached."""
        rows = verdict.rows or (None,) * len(verdict.token_ids)
        for token_id, row in zip(verdict.token_ids, rows, strict=True):
            draft.add(token_id, row)
        draft.sequence.num_cached = len(draft.sequence) - 1
        self._blocks.truncate(draft.sequence, draft.sequence.num_cached)
        self._begin_round(draft)

    def _begin_round(self, draft: Draft) -> None:
        """The smaller drafter's sequence becomes the model's again."""
        inner = self._inners[draft]
        inner.asked = False
        num_kept = _follow(inner.draft, draft.sequence)
        self._smaller.commit(inner.draft, num_kept)

    def _demands(self, drafts: list[Draft]) -> list[Demand]:
        return [self._demand(draft) for draft in drafts]

    def _demand(self, draft: Draft) -> Demand:
        inner, sequence = self._inners[draft], draft.sequence
        if draft.num_missing_tokens and inner.asked and not inner.is_drafting:
            proposal = replace(inner.draft.proposal(0), token_ids=tuple(inner.draft.sequence.tokens[len(sequence) :]))
            return Demand(sequence, draft.awaited, wants_row=True, proposal=proposal if proposal.token_ids else None)
        soon = draft.num_missing_tokens > 0 and sequence.num_uncached_tokens <= MAX_ROUND_LEN
        return Demand(sequence, draft.awaited, deferred=draft.deferred or soon)


def _follow(inner: Draft, sequence: Sequence) -> int:
    """Makes the inner draft's tokens those of `sequence`, drafted ones uncommitted; returns how many stay."""
    own = inner.sequence
    num_same = own.num_committed
    for mine, other in zip(own.tokens[num_same:], sequence.tokens[num_same:], strict=False):
        if mine != other:
            break
        num_same += 1
    own.tokens[num_same:] = sequence.tokens[num_same:]
    own.confirm(sequence.num_committed)
    inner.rows.clear()
    inner.end()
    return num_same
