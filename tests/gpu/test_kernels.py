"""The kernels at the sizes of real models, which no interpreter gets through."""

from __future__ import annotations

import pytest
import torch

from services.engine.cuda.tile_step import AttendArguments
from services.engine.cuda.tiles import StepPlan, StepTensors
from tests.unit.engine.cuda.plain_kernels import PlainKernels
from tests.unit.engine.cuda.step_builders import works

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
NUM_BLOCKS = 1200


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (16, 1, 256), (32, 32, 80)])
@pytest.mark.parametrize(
    "lengths", [[(8000, 1)], [(300 + 70 * i, 5) for i in range(16)], [(1000, 512), (2000, 17), (77, 1)]]
)
def test_attention_is_that_of_plain_torch(
    lengths: list[tuple[int, int]], num_heads: int, num_kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    from services.engine.cuda.attention import TritonKernels

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(1)
    plan = StepPlan.of(works(lengths, 16, NUM_BLOCKS), 16)
    query = torch.randn(plan.shape.num_tokens, num_heads, dim, device=device, generator=generator).to(dtype)
    pool = torch.randn(2, NUM_BLOCKS, 16, num_kv_heads, dim, device=device, generator=generator).to(dtype)
    tensors = StepTensors.view(torch.from_numpy(plan.pack()).to(device), plan.shape)
    kernels = TritonKernels(torch.cuda.get_device_properties(device).multi_processor_count)
    for window, softcap in ((None, None), (500, None), (None, 30.0)):
        arguments = AttendArguments(plan.shape, tensors.tiles, tensors.tables, None, window, softcap)
        found = kernels.attend(query, pool[0], pool[1], arguments)
        expected = PlainKernels().attend(query, pool[0], pool[1], arguments)
        torch.testing.assert_close(found, expected, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
