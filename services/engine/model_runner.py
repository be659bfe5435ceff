"""Computes one step: works in, logits out.

Owns: the model, its KV pool and the call that joins them, with its threads on a CPU. Must not know: sampling,
verification, scheduling, the wire.
"""

from __future__ import annotations

import time

import torch

from services.engine.cpu.kernel_step import KernelStep, num_for_kernel, takes
from services.engine.kv_pool import KvPool
from services.engine.models import CausalModel
from services.engine.paged_attention import PagedStep
from services.engine.step import Work
from services.engine.step_layout import StepLayout, build_layout
from services.engine.thread_choice import ThreadChoice


class ModelRunner:
    """One forward a step, whatever the number of sequences. Called by one thread."""

    def __init__(self, model: CausalModel, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.pool = KvPool(model.layer_shapes, num_blocks, block_size, model.dtype, model.device)
        self._kernels = model.kernels if takes(self.pool) else None
        self._max_threads = torch.get_num_threads() if model.device.type == "cpu" else 1
        self._threads = ThreadChoice(self._max_threads)

    @torch.inference_mode()
    def forward(self, works: list[Work]) -> torch.Tensor:
        """Writes the keys and values of all computed tokens; returns float32 logits (sum of num_rows, vocab_size).

        Rows stand in the order of the works. Block tables must reach over every computed token (see Work).
        """
        if not works:
            return torch.empty(0, self.model.vocab_size, device=self.model.device)
        step, layout = self._step(works)
        return self._logits(step, layout) if self._max_threads == 1 else self._logits_in_time(step, layout)

    def _step(self, works: list[Work]) -> tuple[PagedStep, StepLayout]:
        if self._kernels is not None and (num_works := num_for_kernel(works, self.model.fold, self._kernels.lanes)):
            layout = build_layout(works, self.pool.block_size, self.model.device, grouped=False)
            return KernelStep(self._kernels, self.pool, layout, works, num_works), layout
        layout = build_layout(works, self.pool.block_size, self.model.device)
        return PagedStep(self.pool, layout), layout

    def _logits_in_time(self, step: PagedStep, layout: StepLayout) -> torch.Tensor:
        """With as many threads as are best for so many tokens; afterwards the process has its own number again."""
        num_tokens = len(layout.token_ids)
        num_threads, started_ns = self._threads.num_threads(num_tokens), time.perf_counter_ns()
        torch.set_num_threads(num_threads)
        try:
            logits = self._logits(step, layout)
        finally:
            torch.set_num_threads(self._max_threads)
        self._threads.observe(num_tokens, num_threads, time.perf_counter_ns() - started_ns)
        return logits

    def _logits(self, step: PagedStep, layout: StepLayout) -> torch.Tensor:
        return self.model.logits(layout.token_ids, layout.positions, layout.logit_rows, paged_step=step).float()
