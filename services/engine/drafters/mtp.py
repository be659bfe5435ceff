"""Drafts with several heads on the target's features: one token a step, as many as there are heads, without a cache.

Owns: which sequences take part in a step. Must not know: torch, what features are, the wire.
"""

from __future__ import annotations

from typing import Protocol

from services.common.values import ModelInfo
from services.engine.drafters.base import Draft, Pool
from services.engine.sequence import Sequence
from services.engine.step import Sampled, Work

MTP = "mtp"


class HeadsModel(Protocol):
    """services.engine.mtp_draft.MtpDraftModel."""

    info: ModelInfo

    @property
    def num_heads(self) -> int: ...

    def take(self, sequence: Sequence, features: bytes) -> None: ...

    def forget(self, sequence: Sequence) -> None: ...

    def step(self, works: list[Work]) -> list[Sampled | None]: ...


class MtpDrafter:
    """The Drafter over such heads (services.engine.drafters.base.Drafter)."""

    def __init__(self, model: HeadsModel) -> None:
        self._model = model

    @property
    def kind(self) -> str:
        return MTP

    @property
    def info(self) -> ModelInfo:
        return self._model.info

    @property
    def blocks(self) -> None:
        return None

    def pools(self, drafts: list[Draft]) -> list[Pool]:
        return []

    def open(self, draft: Draft) -> None:
        """Nothing is held before features come."""

    def commit(self, draft: Draft, num_kept: int) -> None:
        """The features are those of the tokens committed last."""
        self._model.take(draft.sequence, draft.features)

    def close(self, draft: Draft) -> None:
        self._model.forget(draft.sequence)

    def is_ready(self, draft: Draft) -> bool:
        return True

    def has_work(self, drafts: list[Draft]) -> bool:
        return any(draft.num_missing_tokens for draft in drafts)

    def step(self, drafts: list[Draft]) -> list[Draft]:
        """A token for each draft that lacks one; behind the last head's a proposal ends."""
        asking = [draft for draft in drafts if draft.num_missing_tokens]
        if not asking:
            return []
        sampled = self._model.step([Work(draft.sequence, 1, num_rows=1) for draft in asking])
        for draft, found in zip(asking, sampled, strict=True):
            if found is None:
                draft.end()
                continue
            draft.add(found.token_id, found.row)
            if len(draft.rows) >= self._model.num_heads:
                draft.end()
        return asking
