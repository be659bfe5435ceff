"""Computes one step on a CUDA device: short steps from a graph, steps with long prefill chunks kernel by kernel.

Owns: the model, its KV pool with one spare block, and the choice between the two. Must not know: Triton, recording,
sampling, scheduling. The host waits for nothing here: indices go over in one copy, logits stay on the device.
"""

from __future__ import annotations

import logging

import torch

from services.engine.cuda.graphs import GraphBackend, NotRecordable, StepGraphs
from services.engine.cuda.tile_step import TileKernels, TileStep
from services.engine.cuda.tiles import TILE_ROWS, StepPlan, StepShape, StepTensors
from services.engine.kv_pool import KvPool
from services.engine.models import CausalModel
from services.engine.progress import Reporter
from services.engine.step import Work
from services.engine.transfer import to_device

log = logging.getLogger(__name__)


class TileRunner:
    """As ModelRunner, for steps in tiles. `graphs` None, or `max_graph_tokens` 0: no step is recorded."""

    def __init__(
        self,
        model: CausalModel,
        num_blocks: int,
        block_size: int,
        kernels: TileKernels,
        graphs: GraphBackend | None = None,
        max_graph_tokens: int = 0,
    ) -> None:
        self.model = model
        self.pool = KvPool(model.layer_shapes, num_blocks + 1, block_size, model.dtype, model.device)
        self._kernels = kernels
        self._max_graph_tokens = max_graph_tokens
        self._graphs: StepGraphs | None = None
        if graphs is not None and max_graph_tokens:
            self._graphs = StepGraphs(
                graphs,
                self._compute,
                max_tokens=max_graph_tokens,
                max_blocks=num_blocks,
                block_size=block_size,
                spare_block=num_blocks,
                vocab_size=model.vocab_size,
                device=model.device,
            )

    @torch.inference_mode()
    def forward(self, works: list[Work]) -> torch.Tensor:
        """As ModelRunner.forward; the logits are valid until the next call."""
        if not works:
            return torch.empty(0, self.model.vocab_size, device=self.model.device)
        if self._graphs is not None and self._is_short(works):
            plan = StepPlan.of(works, self.pool.block_size, grouped=False)
            try:
                if self._graphs.takes(plan):
                    return self._graphs.run(plan)
            except NotRecordable as error:
                self._do_without(error)
        plan = StepPlan.of(works, self.pool.block_size)
        array = to_device(plan.pack(), self.model.device)
        return self._compute(StepTensors.view(array, plan.shape), plan.shape).float()

    @torch.inference_mode()
    def capture_graphs(self, reporter: Reporter) -> None:
        """Records every graph now, so that no later step waits for it.

        A model that cannot be recorded, now or at its first short step, runs without graphs, and the log says so.
        """
        if self._graphs is None:
            return
        try:
            with reporter.task("Recording CUDA graphs", self._graphs.num_shapes) as advance:
                self._graphs.capture_all(advance)
        except NotRecordable as error:
            self._do_without(error)

    def _do_without(self, error: NotRecordable) -> None:
        log.warning("%s runs without CUDA graphs: %s", type(self.model.module).__name__, error)
        self._graphs = None

    def _is_short(self, works: list[Work]) -> bool:
        lens = [work.num_computed_tokens for work in works]
        return max(lens) <= TILE_ROWS[-1] and sum(lens) <= self._max_graph_tokens

    def _compute(self, tensors: StepTensors, shape: StepShape) -> torch.Tensor:
        step = TileStep(self.pool, self._kernels, tensors, shape)
        return self.model.logits(tensors.token_ids, tensors.positions, tensors.logit_rows, paged_step=step)
