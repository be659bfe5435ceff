"""A long context attended in halves gives what attending to it at once gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from services.engine.cpu import halves


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def heads(num_heads: int, num_rows: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    query = torch.randn(1, num_heads, num_rows, 16, generator=generator)
    slots = torch.randn(2, num_tokens, num_heads, 16, generator=generator)
    keys, values = slots.transpose(1, 2).unsqueeze(1).unbind()
    return query, keys, values


def causal_mask(num_rows: int, num_tokens: int) -> torch.Tensor:
    visible = torch.arange(num_tokens) <= (num_tokens - num_rows + torch.arange(num_rows)).unsqueeze(1)
    return torch.zeros(1, 1, num_rows, num_tokens).masked_fill_(~visible, -torch.inf)


@pytest.mark.parametrize("num_tokens", [40, 41, 1600])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_halves_are_joined_to_the_whole(num_rows: int, num_tokens: int) -> None:
    query, keys, values = heads(3, num_rows, num_tokens)
    mask = causal_mask(num_rows, num_tokens)
    expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    attended = halves.attend_in_halves(query, keys, values, halves.halve_mask(mask), 0.3)
    assert attended.shape == expected.shape
    assert torch.allclose(attended, expected, atol=1e-5)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    ("num_heads", "num_rows", "num_tokens", "expected"),
    [
        (3, 12, 2000, True),
        (1, 12, 2000, True),
        (4, 12, 2000, False),  # both threads have as much already
        (3, halves.MAX_ROWS + 1, 2000, False),
        (3, 12, halves.MIN_CONTEXT - 1, False),
    ],
)
def test_halves_are_taken_where_they_even_out_the_threads(
    num_heads: int, num_rows: int, num_tokens: int, expected: bool
) -> None:
    query, keys, _ = heads(num_heads, num_rows, num_tokens)
    assert halves.is_faster(query, keys) == expected
