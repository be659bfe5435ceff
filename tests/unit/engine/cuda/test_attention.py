"""The Triton kernels give what plain attention gives: in the interpreter, or on the device where there is one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from services.engine.cuda import attention
from services.engine.cuda.attention import TritonKernels, choose_num_splits, tile_config
from services.engine.cuda.tile_step import AttendArguments
from services.engine.cuda.tiles import StepPlan, StepTensors
from tests.unit.engine.cuda.plain_kernels import PlainKernels
from tests.unit.engine.cuda.step_builders import works

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE = 16
NUM_BLOCKS = 40
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Layer:
    """Random queries over a random pool whose unused blocks hold NaN, and the step that attends there."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        dim: int = 32,
        value_dim: int | None = None,
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths) + dim)
        value_dim = value_dim or dim
        self.plan = StepPlan.of(works(lengths, block_size, NUM_BLOCKS), block_size)
        num_tokens = self.plan.shape.num_tokens
        # Laid out as a model's: heads before tokens, so that tokens are not contiguous.
        self.query = torch.randn(num_heads, num_tokens, dim, generator=generator).to(dtype).transpose(0, 1)
        self.keys = torch.randn(NUM_BLOCKS, block_size, num_kv_heads, dim, generator=generator).to(dtype)
        self.values = torch.randn(NUM_BLOCKS, block_size, num_kv_heads, value_dim, generator=generator).to(dtype)
        unused = np.setdiff1d(np.arange(NUM_BLOCKS), self.plan.tables)
        self.keys[unused], self.values[unused] = torch.nan, torch.nan

    def check(
        self,
        num_multiprocessors: int = 1,
        *,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        tensors = StepTensors.view(torch.from_numpy(self.plan.pack()), self.plan.shape)
        arguments = AttendArguments(self.plan.shape, tensors.tiles, tensors.tables, scaling, window, softcap)
        expected = PlainKernels().attend(self.query, self.keys, self.values, arguments)
        on_device = replace(
            arguments, tiles=tuple(part.to(DEVICE) for part in arguments.tiles), tables=arguments.tables.to(DEVICE)
        )
        tensors = (tensor.to(DEVICE) for tensor in (self.query, self.keys, self.values))
        found = TritonKernels(num_multiprocessors).attend(*tensors, on_device)
        tolerance = TOLERANCES[self.query.dtype]
        torch.testing.assert_close(found.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 1), (6, 2), (8, 1)])
def test_query_heads_meet_their_own_key_head(num_heads: int, num_kv_heads: int) -> None:
    Layer([(20, 1), (5, 3)], num_heads=num_heads, num_kv_heads=num_kv_heads).check()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_every_type_is_attended_in_within_its_rounding(dtype: torch.dtype) -> None:
    Layer([(70, 5), (3, 2)], dtype=dtype).check()


@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 80), (128, 128), (256, 256), (32, 16), (8, 8)])
def test_head_dimensions_need_not_be_powers_of_two_nor_equal(dim: int, value_dim: int) -> None:
    Layer([(20, 2)], num_heads=2, num_kv_heads=1, dim=dim, value_dim=value_dim).check()


@pytest.mark.parametrize("computed", [1, 2, 5, 8, 9, 17, 32, 33, 70])
def test_rows_see_those_before_them_across_tiles(computed: int) -> None:
    Layer([(19, computed)]).check()


def test_sequences_of_every_length_attend_in_one_step() -> None:
    Layer([(0, 1), (15, 1), (16, 1), (47, 3), (0, 40), (100, 9), (31, 17)]).check()


@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_blocks_may_be_of_any_power_of_two(block_size: int) -> None:
    Layer([(20, 3), (6, 1)], block_size=block_size).check()


@pytest.mark.parametrize("window", [1, 7, 16, 64, 1000])
def test_a_window_hides_what_lies_behind_it(window: int) -> None:
    Layer([(100, 5), (3, 2), (0, 40)]).check(window=window)
    Layer([(300, 5)]).check(num_multiprocessors=16, window=window)


def test_a_soft_cap_bends_the_scores() -> None:
    Layer([(40, 5), (3, 2)]).check(scaling=2.0, softcap=5.0)
    Layer([(40, 5), (3, 2)]).check(scaling=1e4, softcap=5.0)


@pytest.mark.parametrize("num_multiprocessors", [2, 8])
@pytest.mark.parametrize("cached", [0, 125, 126, 253, 400])
def test_splits_join_wherever_they_end(cached: int, num_multiprocessors: int) -> None:
    Layer([(cached, 3), (5, 1)], num_heads=2, num_kv_heads=1).check(num_multiprocessors)


def test_a_graphs_empty_tiles_change_nothing() -> None:
    layer = Layer([(20, 3), (6, 1)])
    (group,) = {group.tile_rows for group in layer.plan.shape.groups} - {2}
    tiles = np.concatenate([*layer.plan.tiles, np.zeros((3, 4), dtype=np.int64)])
    shape = layer.plan.shape._replace(groups=(layer.plan.shape.groups[0]._replace(num_tiles=5, tile_rows=group),))
    layer.plan = replace(layer.plan, tiles=(tiles,), shape=shape)
    layer.check(num_multiprocessors=8)


def test_keys_and_values_land_in_their_slots_and_nowhere_else() -> None:
    for num_heads, dim, value_dim in ((3, 32, 32), (2, 24, 8)):
        keys, values = torch.zeros(5, 4, num_heads, dim), torch.zeros(5, 4, num_heads, value_dim)
        new_keys = torch.randn(num_heads, 3, dim).transpose(0, 1)
        new_values = torch.randn(3, num_heads, value_dim)
        slots = torch.tensor([18, 3, 9])
        expected = keys.clone(), values.clone()
        PlainKernels().write(*expected, slots, new_keys, new_values)
        on_device = [tensor.to(DEVICE) for tensor in (keys, values, slots, new_keys, new_values)]
        TritonKernels(1).write(*on_device)
        assert torch.equal(on_device[0].cpu(), expected[0])
        assert torch.equal(on_device[1].cpu(), expected[1])


def test_the_operators_declare_what_they_change() -> None:
    write = torch.ops.outrider.write_kv.default._schema
    assert [a.name for a in write.arguments if a.alias_info is not None and a.alias_info.is_write] == ["keys", "values"]
    attend = torch.ops.outrider.attend_tiles.default._schema
    assert not any(argument.alias_info for argument in attend.arguments)


def test_a_shape_without_contents_is_enough_to_trace_the_operator() -> None:
    meta = torch.device("meta")
    pool = torch.empty(4, 16, 2, 64, device=meta), torch.empty(4, 16, 2, 48, device=meta)
    tiles, tables = [torch.empty(3, 4, dtype=torch.int64, device=meta)], torch.empty(9, dtype=torch.int64, device=meta)
    query = torch.empty(5, 8, 64, device=meta)
    assert attention.attend_tiles(query, *pool, tiles, tables, [2], 4, 0.1, 0, 0.0).shape == (5, 8, 48)


def test_splits_fill_the_device_and_no_more() -> None:
    assert [choose_num_splits(n, 132) for n in (1, 8, 60, 132, 133, 5000)] == [32, 32, 4, 2, 1, 1]


def test_a_program_takes_no_more_heads_than_its_queries_have_room_for() -> None:
    assert tile_config(2, 4, 128, 2)[:3] == (4, 16, 64)
    assert tile_config(32, 4, 128, 2)[:3] == (4, 128, 64)
    assert tile_config(32, 8, 256, 4)[:3] == (1, 32, 16)
    assert tile_config(8, 3, 64, 2)[:3] == (4, 32, 128)
