"""What computes a model's steps is chosen once, by its device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from services.common.errors import ConfigError, ModelUnsupported
from services.engine.kv_pool import LayerShape
from services.engine.model_runner import ModelRunner
from services.engine.models import probe_model
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.runners import check_tiles, make_runner
from tests.tiny_models import build_model


def test_a_model_in_host_memory_gets_the_plain_runner() -> None:
    register()
    module = build_model(vocab_size=64)
    module.set_attn_implementation(IMPLEMENTATION)
    runner = make_runner(probe_model(module, torch.float32, torch.device("cpu")), 5, 3, max_graph_tokens=512)
    assert isinstance(runner, ModelRunner)
    assert runner.pool.num_blocks == 5


def test_blocks_that_the_kernels_cannot_divide_by_are_refused() -> None:
    check_tiles((LayerShape(2, 64, 64),), 16)
    with pytest.raises(ConfigError, match="block_size: 24 is not a power of two"):
        check_tiles((LayerShape(2, 64, 64),), 24)


def test_heads_that_do_not_fit_a_tile_are_refused() -> None:
    check_tiles((LayerShape(2, 256, 256),), 16)
    with pytest.raises(ModelUnsupported, match="320 dimensions"):
        check_tiles((LayerShape(2, 64, 64), LayerShape(2, 64, 320)), 16)


def test_everything_but_the_kernels_and_their_launch_imports_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import services.engine.paged_model, services.engine.runners, services.engine.compiled\n"
        "import services.engine.cuda.runner, services.engine.cuda.graphs, services.engine.cuda.tile_step\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
