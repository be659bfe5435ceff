"""A step in tiles, replayed or not, padded or not, gives the logits of the plain step."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import pytest
import torch

from services.engine.block_manager import BlockManager
from services.engine.cuda.graphs import GraphBackend, graph_shape, graph_shapes, padded_num_tokens
from services.engine.cuda.runner import TileRunner
from services.engine.cuda.tile_step import TileKernels
from services.engine.cuda.tiles import StepTensors
from services.engine.model_runner import ModelRunner
from services.engine.models import CausalModel, probe_model
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.progress import Reporter
from services.engine.step import Work
from tests.tiny_models import SUPPORTED_FAMILIES, build_model
from tests.unit.engine.cuda.plain_kernels import PlainKernels
from tests.unit.engine.cuda.step_builders import sequence, works

BLOCK_SIZE = 4
NUM_BLOCKS = 60
TOLERANCE = 1e-5
QUIET = Reporter(quiet=True)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Replaying:
    """Records nothing: a replay runs the function again, on whatever the buffers hold then."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        function()

        def replay() -> None:
            self.num_replays += 1
            function()

        return replay


class Refusing:
    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing")


def tiny(family: str = "llama", **arguments: int) -> CausalModel:
    register()
    module = build_model(family, vocab_size=64, **arguments)
    module.set_attn_implementation(IMPLEMENTATION)
    module.config.pad_token_id = None
    return probe_model(module, torch.float32, torch.device("cpu"))


def tile_runner(
    model: CausalModel,
    graphs: GraphBackend | None = None,
    max_graph_tokens: int = 64,
    kernels: TileKernels | None = None,
) -> TileRunner:
    return TileRunner(model, NUM_BLOCKS, BLOCK_SIZE, kernels or PlainKernels(), graphs, max_graph_tokens)


def prefill(runners: list[ModelRunner | TileRunner], step: list[Work]) -> None:
    """Computes everything before the works' rows in every runner's pool."""
    for work in step:
        cached = work.sequence.num_cached
        if cached:
            work.sequence.num_cached = 0
            for runner in runners:
                runner.forward([Work(work.sequence, cached)])
            work.sequence.num_cached = cached


def compare(tiled: TileRunner, step: list[Work], plain: ModelRunner | None = None) -> None:
    plain = plain or ModelRunner(tiled.model, NUM_BLOCKS, BLOCK_SIZE)
    prefill([plain, tiled], step)
    found = tiled.forward(step)
    torch.testing.assert_close(found, plain.forward(step), atol=TOLERANCE, rtol=TOLERANCE)
    pool, spare = tiled.pool, NUM_BLOCKS
    for layer in range(len(tiled.model.layer_shapes)):
        for mine, theirs in zip(pool.layer(layer), plain.pool.layer(layer), strict=True):
            torch.testing.assert_close(mine[:spare], theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_a_mixed_step_gives_the_plain_steps_logits_and_cache(family: str) -> None:
    compare(tile_runner(tiny(family, sliding_window=9)), works([(19, 5), (0, 1), (16, 40), (3, 2)], BLOCK_SIZE, 60))


@pytest.mark.parametrize("lengths", [[(7, 1)], [(7, 5), (0, 3), (20, 1)], [(30, 17), (2, 2)], [(5, 1)] * 9])
def test_a_padded_step_from_a_graph_gives_the_plain_steps_logits_and_cache(lengths: list[tuple[int, int]]) -> None:
    graphs = Replaying()
    compare(tile_runner(tiny(), graphs), works(lengths, BLOCK_SIZE, NUM_BLOCKS))
    assert graphs.num_replays >= 1


def test_a_graph_is_recorded_once_for_all_steps_of_its_padded_shape() -> None:
    graphs = Replaying()
    runner = tile_runner(tiny(), graphs)
    for num_rows in (5, 6, 7, 8, 5):
        runner.forward(works([(0, num_rows)], BLOCK_SIZE, NUM_BLOCKS))
    assert (graphs.num_captures, graphs.num_replays) == (1, 5)


def test_one_step_leaves_nothing_behind_for_the_next_in_the_same_buffers() -> None:
    runner = tile_runner(tiny(), Replaying())
    plain = ModelRunner(runner.model, NUM_BLOCKS, BLOCK_SIZE)
    for seed, lengths in enumerate([[(40, 8)], [(1, 2), (2, 2)], [(0, 1)], [(9, 3), (4, 4)]]):
        compare(runner, works(lengths, BLOCK_SIZE, NUM_BLOCKS, seed), plain)


@pytest.mark.parametrize("lengths", [[(0, 33)], [(0, 30), (0, 30), (0, 5)], [(0, 33), (5, 1)]])
def test_a_long_work_or_step_is_computed_without_a_graph(lengths: list[tuple[int, int]]) -> None:
    graphs = Replaying()
    tile_runner(tiny(), graphs).forward(works(lengths, BLOCK_SIZE, NUM_BLOCKS))
    assert graphs.num_captures == 0


def test_tables_that_outgrow_their_buffer_are_computed_without_a_graph() -> None:
    graphs = Replaying()
    runner = TileRunner(tiny(), 3, BLOCK_SIZE, PlainKernels(), graphs, 16)
    shared = [Work(sequence([1] * 10, 9, [0, 1, 2]), 1, None, 1) for _ in range(16)]
    assert runner.forward(shared).isfinite().all()
    assert graphs.num_captures == 0


def test_every_shape_that_can_come_is_recorded_ahead() -> None:
    graphs = Replaying()
    runner = tile_runner(tiny(num_layers=1), graphs, max_graph_tokens=40)
    runner.capture_graphs(QUIET)
    num_captures, rng = graphs.num_captures, random.Random(3)
    for _ in range(60):
        lengths = [(rng.randrange(4), rng.randint(1, rng.choice([1, 2, 5, 17, 32]))) for _ in range(rng.randint(1, 8))]
        if sum(rows for _, rows in lengths) <= 40:
            runner.forward(works(lengths, BLOCK_SIZE, NUM_BLOCKS))
    assert graphs.num_captures == num_captures


def test_recording_writes_to_no_block_of_a_sequence() -> None:
    runner = tile_runner(tiny(), Replaying())
    runner.capture_graphs(QUIET)
    for layer in range(len(runner.model.layer_shapes)):
        for part in runner.pool.layer(layer):
            assert not part[:NUM_BLOCKS].any()
            assert part[NUM_BLOCKS].any()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_model_that_cannot_be_recorded_runs_without_graphs(ahead: bool, caplog: pytest.LogCaptureFixture) -> None:
    runner = tile_runner(tiny(), Refusing())
    with caplog.at_level(logging.WARNING):
        if ahead:
            runner.capture_graphs(QUIET)
        compare(runner, works([(7, 5), (3, 1)], BLOCK_SIZE, NUM_BLOCKS))
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM runs without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_memory_that_runs_out_while_recording_is_not_taken_for_a_model_that_cannot_be() -> None:
    class Exhausted:
        def capture(self, function: Callable[[], None]) -> Callable[[], None]:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        tile_runner(tiny(), Exhausted()).capture_graphs(QUIET)


def test_a_step_of_no_work_has_no_logits() -> None:
    assert tile_runner(tiny()).forward([]).shape == (0, 64)


def test_generation_over_many_steps_and_reused_blocks_is_that_of_the_plain_runner() -> None:
    model = tiny("mistral", sliding_window=11)
    tokens = []
    for runner in (ModelRunner(model, NUM_BLOCKS, BLOCK_SIZE), tile_runner(model, Replaying())):
        blocks, open_now, done, rng = BlockManager(NUM_BLOCKS, BLOCK_SIZE), [], [], random.Random(5)
        for _ in range(40):
            if len(open_now) < 3:
                open_now.append(sequence([rng.randrange(1, 60) for _ in range(rng.randint(1, 40))], 0, []))
            step = []
            for item in open_now:
                blocks.extend(item, len(item))
                step.append(Work(item, item.num_uncached_tokens, None, 1))
            for item, best in zip(open_now, runner.forward(step).argmax(1).tolist(), strict=True):
                item.num_cached = len(item)
                item.tokens.append(best)
            if rng.random() < 0.3:
                done.append(open_now.pop(rng.randrange(len(open_now))))
                blocks.free(done[-1])
        tokens.append([item.tokens for item in (*done, *open_now)])
    assert tokens[0] == tokens[1]


def test_the_kernels_compute_a_whole_models_steps() -> None:
    pytest.importorskip("triton")
    from services.engine.cuda.attention import TritonKernels

    if torch.cuda.is_available():
        pytest.skip("a model in host memory needs the interpreter; tests/gpu has one on the device")
    model = tiny("gemma2", sliding_window=9, num_layers=1)
    compare(tile_runner(model, Replaying(), kernels=TritonKernels(1)), works([(6, 3)], BLOCK_SIZE, NUM_BLOCKS))


def test_padding_adds_at_most_a_quarter_and_few_shapes() -> None:
    padded = [padded_num_tokens(n) for n in range(1, 513)]
    assert all(n <= m for n, m in enumerate(padded, start=1))
    assert all(m <= 1.25 * n for n, m in enumerate(padded, start=1) if n > 32)
    assert len(set(padded)) <= 24
    assert len(graph_shapes(512)) <= 70
    assert graph_shapes(512)[0] == graph_shape(512, 2)


def test_views_into_one_buffer_do_not_overlap() -> None:
    shape = graph_shape(8, 8)
    array = torch.arange(shape.tables_start + 5)
    tensors = StepTensors.view(array, shape)
    parts = [tensors.token_ids, tensors.positions, tensors.slots, tensors.logit_rows, *tensors.tiles, tensors.tables]
    assert torch.cat([part.flatten() for part in parts]).tolist() == array.tolist()
