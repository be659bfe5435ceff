"""The pool gives back what was written, block by block, within its memory."""

from __future__ import annotations

import pytest
import torch

from services.engine.kv_pool import KvPool, LayerShape, block_bytes

SHAPES = (LayerShape(2, 8, 8), LayerShape(1, 16, 4))


def test_blocks_are_gathered_in_the_order_of_the_table() -> None:
    pool = KvPool(SHAPES, 4, 2, torch.float32, torch.device("cpu"))
    keys, values = torch.randn(3, 1, 16), torch.randn(3, 1, 4)
    pool.write(1, torch.tensor([6, 7, 2]), keys, values)
    gathered_keys, gathered_values = pool.gather(1, torch.tensor([[3, 1], [1, 0]]))
    assert gathered_keys.shape == (2, 1, 4, 16)
    torch.testing.assert_close(gathered_keys[0, 0, :3], keys[:, 0])
    torch.testing.assert_close(gathered_values[1, 0, 0], values[2, 0])
    assert not gathered_keys[1, 0, 1:].any()


def test_a_block_takes_keys_and_values_of_every_layer() -> None:
    assert block_bytes(SHAPES, 16, torch.bfloat16) == (2 * 16 + 20) * 16 * 2


@pytest.mark.parametrize(
    ("number", "finite"), [(3e38, True), (torch.inf, False), (-torch.inf, False), (torch.nan, False)]
)
def test_blocks_are_finite_whose_values_are_whatever_they_add_up_to(number: float, finite: bool) -> None:
    pool = KvPool(SHAPES, 4, 2, torch.float32, torch.device("cpu"))
    pool.layer(0)[1][2] = number
    assert pool.is_finite([1, 2]) == finite
    assert pool.is_finite([1, 3])
    assert pool.is_finite([2], first_layer=-1)


def test_a_pool_that_no_memory_holds_is_an_error_that_says_so() -> None:
    with pytest.raises(MemoryError, match="memory"):
        KvPool(SHAPES, 1 << 50, 2, torch.float32, torch.device("cpu"))
