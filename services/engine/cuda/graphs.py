"""CUDA graphs of short steps: recorded once for each padded shape, replayed with new contents in fixed buffers.

Owns: the shapes there are, the buffers they share, what is recorded. Must not know: what a step computes.

Launching a step's kernels one by one costs the host milliseconds, which short steps don't take on the device. A graph
fixes every address and every grid, so tokens, slots, tiles and tables lie in one buffer that is filled by one copy
before a replay, and the number of tokens is padded to one of few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from services.engine.cuda.tiles import TILE_ROWS, StepPlan, StepShape, StepTensors, TileGroup
from services.engine.transfer import pinned

Compute = Callable[[StepTensors, StepShape], torch.Tensor]
"""Logits (num_logits, vocab_size) of a step whose indices lie in the tensors; depends on their contents on the device
alone, and writes the keys and values of its tokens."""


class NotRecordable(Exception):
    """A step of the model cannot be made a graph."""


class GraphBackend(Protocol):
    """Recording. Everything happens on the caller's stream and thread, in order."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records `function` and returns its replay. It may be run before, more than once, and must not mind.

        Raises RuntimeError where it cannot be recorded, because it waits for the device, for example.
        """
        ...


class CudaGraphs:
    """torch.cuda.CUDAGraph; all graphs share one memory pool, since one is replayed at a time."""

    NUM_WARM_UPS = 2
    """Runs before recording: kernels are compiled and libraries take their workspace then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        current = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(self.NUM_WARM_UPS):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        return graph.replay


def padded_num_tokens(num_tokens: int) -> int:
    """1, 2, 4, 8, 16, then steps of a quarter of the power of two below: at most a quarter more than asked for."""
    if num_tokens <= 8:
        return 1 << (num_tokens - 1).bit_length()
    step = max(8, 1 << (num_tokens - 1).bit_length() - 3)
    return -(-num_tokens // step) * step


def graph_shape(num_tokens: int, tile_rows: int) -> StepShape:
    """A padded step: a row of logits and a tile for every token, of which few are used where tiles hold several."""
    num_padded = padded_num_tokens(num_tokens)
    return StepShape(num_padded, num_padded, (TileGroup(num_padded, tile_rows),))


def graph_shapes(max_tokens: int) -> list[StepShape]:
    """Every shape of at most `max_tokens` tokens that a step can have, largest first, so that memory is taken once."""
    counts = sorted({padded_num_tokens(n) for n in range(1, max_tokens + 1)}, reverse=True)
    lowest = [0, *TILE_ROWS[:-1]]
    return [graph_shape(n, rows) for n in counts for rows, below in zip(TILE_ROWS, lowest, strict=True) if n > below]


class StepGraphs:
    """The graphs of one model and their buffers, for steps of at most `max_tokens` tokens, each work a tile or less.

    `max_blocks`: block ids that fit beside them; a step with more, which only sharing makes, is not taken.
    `spare_block` belongs to no sequence.
    """

    def __init__(
        self,
        backend: GraphBackend,
        compute: Compute,
        *,
        max_tokens: int,
        max_blocks: int,
        block_size: int,
        spare_block: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._backend = backend
        self._compute = compute
        self._max_tokens = padded_num_tokens(max_tokens)
        self._block_size = block_size
        self._spare_block = spare_block
        self._replays: dict[StepShape, Callable[[], None]] = {}
        largest = graph_shape(max_tokens, TILE_ROWS[-1])
        self._array = torch.zeros(largest.tables_start + max_blocks + 2, dtype=torch.int64, device=device)
        self._logits = torch.zeros(self._max_tokens, vocab_size, dtype=torch.float32, device=device)

    @property
    def num_shapes(self) -> int:
        return len(graph_shapes(self._max_tokens))

    def takes(self, plan: StepPlan) -> bool:
        """Whether a plan of one group can be run."""
        (group,) = plan.shape.groups
        shape = graph_shape(plan.shape.num_tokens, group.tile_rows)
        fits = shape.tables_start + len(plan.tables) + 2 <= len(self._array)
        return shape.num_tokens <= self._max_tokens and fits

    def capture_all(self, advance: Callable[[float], None]) -> None:
        """Records every shape now, not when it is first needed; `advance` gets how many are. Raises NotRecordable."""
        for done, shape in enumerate(graph_shapes(self._max_tokens), start=1):
            self._captured(shape)
            advance(done)

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Float32 logits (num_logits, vocab_size) of a plan that `takes` accepts; valid until the next call.

        Raises NotRecordable, the pool being as it was, where the shape is new and cannot be recorded.
        """
        shape = graph_shape(plan.shape.num_tokens, plan.shape.groups[0].tile_rows)
        replay = self._captured(shape)
        self._fill(plan, shape)
        replay()
        return self._logits[: plan.shape.num_logits]

    def _captured(self, shape: StepShape) -> Callable[[], None]:
        if shape not in self._replays:
            tensors, out = StepTensors.view(self._array, shape), self._logits[: shape.num_logits]
            self._fill(StepPlan.empty(), shape)

            def step() -> None:
                out.copy_(self._compute(tensors, shape))

            try:
                self._replays[shape] = self._backend.capture(step)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise NotRecordable(str(error)) from error
        return self._replays[shape]

    def _fill(self, plan: StepPlan, shape: StepShape) -> None:
        padded = plan.padded(shape, self._spare_block * self._block_size, self._spare_block)
        packed = pinned(padded.pack(), self._array.device)
        self._array[: len(packed)].copy_(packed, non_blocking=True)
