"""The kernels compute what torch does, keep NaN in its row, and round as torch rounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from services.engine.cpu.kernels import Kernels
from services.engine.cpu.loading import load_kernels

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def kernels_for(dtype: torch.dtype) -> Kernels:
    kernels = load_kernels(dtype)
    assert kernels is not None
    return kernels


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (3, 65), (9, 1)])
def test_a_norm_of_a_sum_is_both(dtype: torch.dtype, rows: int, width: int) -> None:
    hidden, delta, weight = normal(rows, width, dtype=dtype, scale=3.0), normal(rows, width, dtype=dtype), normal(width)
    total, out = hidden + delta, torch.empty_like(hidden)
    kernel = kernels_for(dtype).add_rms_norm
    kernel(hidden.data_ptr(), delta.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, 1e-3)
    assert torch.equal(hidden, total)
    expected = total.double() / (total.double().square().sum(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    again = torch.empty_like(out)
    kernel(hidden.data_ptr(), 0, weight.data_ptr(), again.data_ptr(), rows, width, 1e-3)
    assert torch.equal(hidden, total)
    assert torch.equal(again, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 1000.0])
def test_silu_and_mul(dtype: torch.dtype, scale: float) -> None:
    gate_up = normal(3, 2 * 70, dtype=dtype, scale=scale)
    out = gate_up.new_empty(3, 70)
    kernels_for(dtype).silu_and_mul(gate_up.data_ptr(), out.data_ptr(), 3, 70)
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(out.double(), F.silu(gate) * up, rtol=TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype, fault: float) -> None:
    kernels = kernels_for(dtype)
    hidden, weight = normal(3, 40, dtype=dtype), torch.ones(40)
    hidden[1, 7] = fault
    out = torch.empty_like(hidden)
    kernels.add_rms_norm(hidden.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), 3, 40, 1e-3)
    assert not out[1].isfinite().all()
    assert out[[0, 2]].isfinite().all()
    product = hidden.new_empty(3, 20)
    kernels.silu_and_mul(hidden.data_ptr(), product.data_ptr(), 3, 20)
    assert product.isfinite().all(-1).tolist() == [True, False, True]


def test_bfloat16_is_rounded_to_the_nearest_and_to_even() -> None:
    values = torch.cat([normal(4000), torch.tensor([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -1.0 - 2.0**-8])])
    parts = values.bfloat16(), (values - values.bfloat16().float()).bfloat16()
    hidden, expected, out = parts[0].clone(), parts[0] + parts[1], torch.empty_like(parts[0])
    num, weight = len(values), torch.ones(len(values))
    kernel = kernels_for(torch.bfloat16).add_rms_norm
    kernel(hidden.data_ptr(), parts[1].data_ptr(), weight.data_ptr(), out.data_ptr(), 1, num, 1.0)
    assert torch.equal(hidden, expected)
