"""The kernels compile for devices that are not there, and fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MAX_SHARED_BYTES = 99 << 10
"""A program's limit on the smallest of the recent devices (compute capability 8.6 and 8.9)."""


def test_every_kernel_compiles_and_fits_with_tensor_cores_where_the_type_has_them(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.unit.engine.cuda.compile_kernels"]
    run = subprocess.run(
        command,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 12
    for name, taken in found:
        assert taken["shared"] <= MAX_SHARED_BYTES, name
        if name.startswith("Case"):
            assert taken["asynchronous"], name
            assert taken["tensor_cores"] == ("float32" not in name), name
