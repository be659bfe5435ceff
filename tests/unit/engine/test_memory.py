"""The pool's size follows from the budget, or the start fails with the setting's name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.common.errors import ConfigError
from services.engine.memory import MIB, PoolBudget, free_host_memory, module_bytes, size_pool
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from tests.tiny_models import save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUIET = Reporter(quiet=True)


def num_blocks(budget: PoolBudget, free_mib: int, device: torch.device = CPU) -> int:
    """Of blocks of 1 MiB over 4 layers."""
    return size_pool(budget, MIB, 4, free_mib * MIB, device).num_blocks


def test_bytes_hold_as_many_whole_blocks_as_fit() -> None:
    assert num_blocks(PoolBudget(0, 0.0, 10 * MIB + 1), 100) == 10


def test_a_share_is_of_what_is_free_after_a_layer_that_a_step_copies() -> None:
    assert num_blocks(PoolBudget(0, 0.5, MIB), 100) == 40
    assert num_blocks(PoolBudget(0, 1.0, MIB), 100) == 80


def test_on_cuda_blocks_are_read_in_place_and_the_workspace_is_out_of_the_free_memory_already() -> None:
    assert num_blocks(PoolBudget(0, 0.5, MIB), 100, CUDA) == 50


def test_a_number_of_blocks_goes_before_a_share_and_a_share_before_bytes() -> None:
    assert num_blocks(PoolBudget(7, 0.5, MIB), 100) == 7
    assert num_blocks(PoolBudget(0, 0.5, MIB), 100) == 40


@pytest.mark.parametrize(
    ("budget", "setting"),
    [
        (PoolBudget(90, 0.0, MIB), "num_blocks"),
        (PoolBudget(0, 0.0, 90 * MIB), "kv_memory_mb"),
    ],
)
def test_more_than_is_free_is_refused_by_the_setting(budget: PoolBudget, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: a KV pool of 90 MiB does not fit .* 100 MiB are free"):
        num_blocks(budget, 100)


@pytest.mark.parametrize(
    ("budget", "setting"),
    [(PoolBudget(0, 0.0, MIB - 1), "kv_memory_mb"), (PoolBudget(0, 0.001, MIB), "kv_memory_share")],
)
def test_less_than_a_block_is_refused_by_the_setting(budget: PoolBudget, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}: .* MiB hold no block of the KV pool; one takes 1.00 MiB"):
        num_blocks(budget, 100)


def test_free_memory_is_what_the_system_has_or_the_control_group_has_left(tmp_path: Path) -> None:
    meminfo, limit, usage = (tmp_path / name for name in ("meminfo", "max", "current"))
    meminfo.write_text("MemTotal: 4000 kB\nMemAvailable: 2000 kB\n")
    usage.write_text("500000\n")
    cgroups = ((limit, usage),)
    assert free_host_memory(meminfo, cgroups) == 2000 << 10
    limit.write_text("max\n")
    assert free_host_memory(meminfo, cgroups) == 2000 << 10
    limit.write_text("700000\n")
    assert free_host_memory(meminfo, cgroups) == 200_000


def test_this_machine_has_free_memory() -> None:
    assert 16 * MIB < free_host_memory() < 1 << 50


def test_weights_are_counted_in_bytes() -> None:
    assert module_bytes(torch.nn.Linear(10, 20, dtype=torch.bfloat16)) == (10 * 20 + 20) * 2


def test_the_start_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, kv_memory_bytes=MIB), Reporter())
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("Memory on cpu"))
    assert "weights 0.1 MiB, KV pool 1.0 of" in line
    assert line.endswith(f"(kv_memory_mb), {engine.num_blocks} blocks, {engine.num_blocks * 16} tokens")


def test_a_pool_that_cannot_be_allocated_fails_the_start(tmp_path: Path) -> None:
    options = EngineOptions(str(save_model(tmp_path)), tmp_path, kv_memory_bytes=1 << 60)
    with pytest.raises(ConfigError, match=r"kv_memory_mb: a KV pool of \d+ MiB does not fit beside the weights on cpu"):
        load_engine(options, QUIET)
