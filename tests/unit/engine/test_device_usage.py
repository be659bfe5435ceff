"""What a worker tells of its device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from services.common.values import DeviceUsage
from services.engine.device_usage import device_usage_of, host_usage, utilisation_of


def test_on_a_cpu_it_is_the_processs_memory_and_the_machines(tmp_path: Path) -> None:
    statm = tmp_path / "statm"
    statm.write_text("1000 300 50 1 0 100 0")
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    assert host_usage(statm) == DeviceUsage(300 * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes)
    assert device_usage_of("cpu")().memory_used_bytes > 10**7


def test_a_system_that_does_not_tell_has_none(tmp_path: Path) -> None:
    assert host_usage(tmp_path / "nothing") == DeviceUsage(0, 0)


def test_on_cuda_memory_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30, 100))
    assert device_usage_of("cuda:0")() == DeviceUsage(70, 100)


@pytest.mark.parametrize("missing", [False, True])
def test_utilisation_is_known_on_cuda_where_nvml_is_there(monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    def utilization() -> int:
        if missing:
            raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")
        return 40

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    assert utilisation_of("cuda")() == (None if missing else 0.4)
    assert utilisation_of("cpu")() is None
