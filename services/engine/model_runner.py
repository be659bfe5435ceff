"""Computes one step: works in, logits out.

Owns: the model, its KV pool and the call that joins them. Must not know: sampling, verification, scheduling, the wire.
"""

from __future__ import annotations

import torch

from services.engine.kv_pool import KvPool
from services.engine.models import CausalModel
from services.engine.paged_attention import PagedStep
from services.engine.step import Work
from services.engine.step_layout import build_layout


class ModelRunner:
    """One forward a step, whatever the number of sequences. Called by one thread."""

    def __init__(self, model: CausalModel, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.pool = KvPool(model.layer_shapes, num_blocks, block_size, model.dtype, model.device)

    @torch.inference_mode()
    def forward(self, works: list[Work]) -> torch.Tensor:
        """Writes the keys and values of all computed tokens; returns float32 logits (sum of num_rows, vocab_size).

        Rows stand in the order of the works. Block tables must reach over every computed token (see Work).
        """
        if not works:
            return torch.empty(0, self.model.vocab_size, device=self.model.device)
        layout = build_layout(works, self.pool.block_size, self.model.device)
        step = PagedStep(self.pool, layout)
        return self.model.logits(layout.token_ids, layout.positions, layout.logit_rows, paged_step=step).float()
