"""The input of a draft that is fed with its target's features: for each token its embedding and, where it is known, the
target's final hidden state before it.

Owns: how the two are joined. Must not know: where features come from, sequences. After Li et al. 2024, "EAGLE:
Speculative Sampling Requires Rethinking Feature Uncertainty", section 3. A token without a feature has zeros for it, as
in training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from services.engine.transfer import to_device

MAX_ROWS = 2048
"""Tokens of a step that may have features; those behind go without."""


def join(embedded: Tensor, features: Tensor, projection: Tensor) -> Tensor:
    """Inputs (..., width) from embeddings (..., width), features (..., hidden) and the projection (width, hidden).

    Features are brought to unit scale, since hidden states of some targets are large.
    """
    return embedded + torch.nn.functional.linear(to_scale(features), projection)


def to_scale(features: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(features, (features.shape[-1],), eps=1e-6)


class FeatureInput(torch.nn.Module):
    """In the place of a model's token embedding: ids (1, n) to inputs (1, n, width). `put` comes before each call.

    Features lie in a buffer whose address never changes, so that a recorded step reads them when it is replayed.
    """

    rows: Tensor

    def __init__(self, table: Tensor, projection: Tensor) -> None:
        """`table` [V, width]: the embeddings. `projection` [width, hidden]: of features."""
        super().__init__()
        self.lookup = torch.nn.Embedding.from_pretrained(table, freeze=True)  # type: ignore[no-untyped-call]
        self.projection = torch.nn.Linear(projection.shape[1], projection.shape[0], bias=False, device="meta")
        self.projection.weight = torch.nn.Parameter(projection, requires_grad=False)
        self.register_buffer("rows", torch.zeros(MAX_ROWS, projection.shape[1]), persistent=False)

    @property
    def feature_width(self) -> int:
        return self.rows.shape[1]

    def put(self, num_tokens: int, indices: list[int], features: list[Tensor]) -> None:
        """For the next call, of `num_tokens` tokens: features (hidden,) of those at `indices`; the others have none."""
        kept = [(index, row) for index, row in zip(indices, features, strict=True) if index < MAX_ROWS]
        self.rows[:num_tokens].zero_()
        if kept:
            at = to_device(np.array([index for index, _ in kept]), self.rows.device)
            self.rows.index_copy_(0, at, torch.stack([row for _, row in kept]).to(self.rows.dtype))

    def forward(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.lookup(token_ids)
        rows = self.rows[: token_ids.shape[-1]]
        projected = self.projection(to_scale(rows))
        return embedded + torch.nn.functional.pad(projected, (0, 0, 0, token_ids.shape[-1] - len(rows)))
