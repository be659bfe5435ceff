"""Drafts by the first of several drafters that has a proposal: lookups, then one that always has one.

Owns: who proposes, and when the last one catches up. Must not know: models, how anyone drafts.

Who proposes is decided for each proposal by what the lookups find, so by committed tokens alone, never by what was
sampled. Every stage hears of every commit. What the last one's cache lacks waits until it is asked, and is then
computed in the step of its first token, as long as that is one step: up to MAX_ROUND_LEN tokens. Beyond, it catches up
in an idle step.
"""

from __future__ import annotations

from services.common.values import ModelInfo
from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Draft, Drafter, Pool
from services.engine.scheduler import MAX_ROUND_LEN


class FallbackDrafter:
    """The Drafter over a chain (services.engine.drafters.base.Drafter).

    `lookups` complete every proposal in the step that begins it, without tokens where they have no match.
    """

    def __init__(self, lookups: list[Drafter], last: Drafter) -> None:
        if not lookups:
            raise ValueError("a chain has at least two drafters")
        self._lookups = lookups
        self._last = last
        self._opening: set[Draft] = set()
        """Drafts whose prefix the last stage has not processed yet."""
        self._passed_on: set[Draft] = set()
        """Drafts whose proposal in progress is the last stage's."""

    @property
    def kind(self) -> str:
        return ",".join(stage.kind for stage in (*self._lookups, self._last))

    @property
    def info(self) -> ModelInfo | None:
        return self._last.info

    @property
    def blocks(self) -> BlockManager | None:
        return self._last.blocks

    def pools(self, drafts: list[Draft]) -> list[Pool]:
        return self._last.pools(drafts)

    def open(self, draft: Draft) -> None:
        for stage in (*self._lookups, self._last):
            stage.open(draft)
        self._opening.add(draft)

    def commit(self, draft: Draft, num_kept: int) -> None:
        self._passed_on.discard(draft)
        for stage in (*self._lookups, self._last):
            stage.commit(draft, num_kept)
        draft.deferred = draft not in self._opening and draft.sequence.num_uncached_tokens <= MAX_ROUND_LEN

    def close(self, draft: Draft) -> None:
        for stage in (*self._lookups, self._last):
            stage.close(draft)
        self._opening.discard(draft)
        self._passed_on.discard(draft)

    def is_ready(self, draft: Draft) -> bool:
        return self._last.is_ready(draft)

    def has_work(self, drafts: list[Draft]) -> bool:
        return any(self._is_undecided(draft) for draft in drafts) or self._last.has_work(drafts)

    def step(self, drafts: list[Draft]) -> list[Draft]:
        """Completes what the lookups have; else one step of the last stage, which no lookup waits for."""
        undecided = [draft for draft in drafts if self._is_undecided(draft)]
        if served := [draft for draft in undecided if self._look_up(draft)]:
            return served
        taking_part = self._last.step(drafts)
        self._opening = {draft for draft in self._opening if not self._last.is_ready(draft)}
        return taking_part

    def _is_undecided(self, draft: Draft) -> bool:
        return draft.num_missing_tokens > 0 and draft not in self._passed_on

    def _look_up(self, draft: Draft) -> bool:
        """Whether a lookup had a proposal; if none had, the last stage is to make it."""
        num_missing = draft.num_missing_tokens
        for lookup in self._lookups:
            lookup.step([draft])
            if draft.drafted:
                return True
            draft.num_missing_tokens = num_missing
        self._passed_on.add(draft)
        draft.deferred = False
        return False
