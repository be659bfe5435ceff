"""Drafts with a head on the target's features: one token a step, from the final hidden state before it.

Owns: which part of the cache a commit makes worth computing again. Must not know: torch, what features are, the wire.
After Li et al. 2024, "EAGLE", section 3: the chain of a proposal runs on the head's own features; what is accepted is
computed again with the target's, in the step of the next proposal's first token.

Where features are missing, the head is used as it is: on the prompt and on a reopened sequence each token has its
embedding alone, as in training, and accepted tokens whose features were lost keep the head's own.
"""

from __future__ import annotations

from typing import Protocol

from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Draft
from services.engine.drafters.model import ModelDrafter
from services.engine.scheduler import DEFAULT_PREFILL_BUDGET
from services.engine.sequence import Sequence
from services.engine.step import DraftModel

FEATURES = "features"


class FeatureModel(DraftModel, Protocol):
    """services.engine.feature_draft.FeatureDraftModel."""

    def take(self, sequence: Sequence, num_kept: int, features: bytes) -> int: ...

    def forget(self, sequence: Sequence) -> None: ...


class FeatureDrafter(ModelDrafter):
    """The Drafter over a FeatureModel and its KV pool (services.engine.drafters.base.Drafter)."""

    def __init__(
        self, model: FeatureModel, blocks: BlockManager, *, prefill_budget: int = DEFAULT_PREFILL_BUDGET
    ) -> None:
        super().__init__(model, blocks, prefill_budget=prefill_budget, kind=FEATURES)
        self._features = model

    def commit(self, draft: Draft, num_kept: int) -> None:
        """Cuts the cache in front of the first token whose feature is news; shared blocks stay as they are."""
        first = self._features.take(draft.sequence, num_kept, draft.features)
        first_own = draft.sequence.num_shared_blocks * self.blocks.block_size
        super().commit(draft, max(min(num_kept, first), first_own))

    def close(self, draft: Draft) -> None:
        super().close(draft)
        self._features.forget(draft.sequence)
