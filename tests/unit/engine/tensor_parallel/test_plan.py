"""What cannot be cut into shards is refused with the reason, before any process is started."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.common.errors import ConfigError, ModelUnsupported
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from services.engine.tensor_parallel import plan, ranks
from tests.tiny_models import save_model, tiny_config


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_models_without_a_plan(family: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"no tensor-parallel plan for models of type {family}"):
        plan.check_model(tiny_config(family), 2)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (3, "4 attention heads cannot be divided among 3 ranks"),
        (4, "2 key-value heads cannot be divided among 4 ranks"),
    ],
)
def test_heads_that_do_not_divide(size: int, reason: str) -> None:
    with pytest.raises(ModelUnsupported, match=reason):
        plan.check_model(tiny_config("llama", num_heads=4, num_kv_heads=2), size)


def test_heads_that_divide_are_fine() -> None:
    plan.check_model(tiny_config("llama", num_heads=4, num_kv_heads=2), 2)
    plan.check_model(tiny_config("gpt_neox", num_heads=4), 4)


def test_fewer_devices_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2 ranks need a GPU each; there are 1"):
        plan.check_device(torch.device("cuda"), 2)


def test_one_device_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    with pytest.raises(ConfigError, match="cuda:1 names one device"):
        plan.check_device(torch.device("cuda:1"), 2)


def test_a_device_that_this_torch_does_not_shard_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    with pytest.raises(ConfigError, match="over cuda devices only, but the device is cpu"):
        plan.check_device(torch.device("cpu"), 2)


def test_no_process_is_started_for_a_refused_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    options = EngineOptions(str(save_model(tmp_path, "gpt2")), tmp_path, num_ranks=2)
    with pytest.raises(ModelUnsupported, match="no tensor-parallel plan"):
        load_engine(options, Reporter(quiet=True))
