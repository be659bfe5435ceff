"""Drafts with a causal language model: one token a step for every sequence that lacks one, all in one forward.

Owns: which part of which sequence a step of the model computes. Must not know: torch, what the model is (DraftModel).

    after a rejection        the cache is cut behind the last token kept, the target's own token is the one to compute
    after a full acceptance  the last drafted token was never computed either: the next step computes two tokens
Both fall out of num_cached: a step computes the tokens at [num_cached, len(tokens)).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from services.common.values import ModelInfo
from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Draft, Pool
from services.engine.scheduler import DEFAULT_PREFILL_BUDGET, Demand, Scheduler
from services.engine.step import DraftModel


class ModelDrafter:
    """The Drafter over a DraftModel and its KV pool (services.engine.drafters.base.Drafter)."""

    def __init__(
        self,
        model: DraftModel,
        blocks: BlockManager,
        *,
        prefill_budget: int = DEFAULT_PREFILL_BUDGET,
        kind: str = "model",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._scheduler = Scheduler(blocks, prefill_budget)
        self._kind = kind
        self._clock = clock

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @property
    def blocks(self) -> BlockManager:
        return self._blocks

    def pools(self, drafts: list[Draft]) -> list[Pool]:
        return [Pool(self._blocks, [draft.sequence for draft in drafts])]

    def open(self, draft: Draft) -> None:
        """Nothing is held before the first step."""

    def commit(self, draft: Draft, num_kept: int) -> None:
        """Cuts the cache; the last token stays uncached, so that the next step has a row to compute."""
        self._blocks.truncate(draft.sequence, min(num_kept, len(draft.sequence) - 1))

    def close(self, draft: Draft) -> None:
        """Frees the sequence; its committed prefix stays cached while there is room."""
        self._blocks.share(draft.sequence)
        self._blocks.free(draft.sequence)

    def is_ready(self, draft: Draft) -> bool:
        return draft.sequence.num_uncached_tokens <= 1

    def has_work(self, drafts: list[Draft]) -> bool:
        return self._scheduler.has_work(_demand(draft) for draft in drafts if _has_work(draft))

    def step(self, drafts: list[Draft]) -> list[Draft]:
        """One forward: a token for each draft that lacks one, and chunks of prefixes not processed yet."""
        busy = [draft for draft in drafts if _has_work(draft)]
        num_expected_rows, sequences = len(drafts) - len(busy), [draft.sequence for draft in drafts]
        works = self._scheduler.plan([_demand(draft) for draft in busy], num_expected_rows, sequences)
        if not works:
            return []
        started_ns = self._clock()
        tokens = self._model.step(works)
        self._scheduler.observe(works, self._clock() - started_ns)
        draft_of = {id(draft.sequence): draft for draft in busy}
        taking_part: list[Draft] = []
        for work, sampled in zip(works, tokens, strict=True):
            draft = draft_of[id(work.sequence)]
            draft.sequence.num_cached += work.num_new_tokens
            self._blocks.share(draft.sequence)
            if sampled is not None:
                draft.add(sampled.token_id, sampled.row)
            elif work.num_rows:
                draft.end()
            taking_part.append(draft)
        return taking_part


def _has_work(draft: Draft) -> bool:
    """Whether there is something to compute. Asked of all drafts in every step, most of which may be idle."""
    return draft.num_missing_tokens > 0 or (draft.sequence.num_uncached_tokens > 1 and not draft.deferred)


def _demand(draft: Draft) -> Demand:
    wants_row = draft.num_missing_tokens > 0
    return Demand(draft.sequence, awaited=draft.awaited, wants_row=wants_row, deferred=draft.deferred)
