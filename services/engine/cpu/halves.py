"""The attention of one sequence with a long context on a CPU, computed as that of two sequences with half of it each.

Owns: when that is faster, and how the halves are joined. Must not know: models, blocks, steps.

torch gives each thread whole heads: three key heads keep two threads busy for the time of two each. In halves they take
the time of three halves. This is the splitting of Dao et al. 2023 (Flash-Decoding), with two parts.
"""

from __future__ import annotations

import torch

MIN_CONTEXT = 1536
"""Tokens from which a shorter product is worth the joining."""
MAX_ROWS = 32
"""Query rows of a key head; torch gives more of them to several threads itself."""


def is_faster(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether halves pay for (1, kv heads, rows, dim) and (1, kv heads, tokens, dim)."""
    batch, num_heads, num_rows, _ = query.shape
    if batch > 1 or num_rows > MAX_ROWS or keys.shape[2] < MIN_CONTEXT or query.device.type != "cpu":
        return False
    num_threads = torch.get_num_threads()
    return -(-2 * num_heads // num_threads) < 2 * -(-num_heads // num_threads)


def halve_mask(mask: torch.Tensor) -> torch.Tensor:
    """Of (1, 1, rows, tokens) for each half. Where the number of tokens is odd, both have the middle one's place, and
    the second must not see it."""
    halves = _halve(mask, 3).clone()
    halves[1, ..., : 2 * halves.shape[3] - mask.shape[3]] = -torch.inf
    return halves


def attend_in_halves(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, masks: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """As scaled_dot_product_attention, of shapes as in `is_faster`, and `masks` (2, 1, rows, tokens of a half).

    Every row must see something in both halves.
    """
    attended: torch.Tensor
    attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.expand(2, -1, -1, -1), _halve(keys, 2), _halve(values, 2), attn_mask=masks, scale=scale
    )
    shares = torch.softmax(log_sums, 0).unsqueeze(-1)
    return (attended * shares).sum(0, keepdim=True).to(query.dtype)


def _halve(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """A view of (1, ...) as (2, ...), whose `axis` is half as long, rounded up."""
    num_tokens = tensor.shape[axis]
    half = -(-num_tokens // 2)
    return tensor.unfold(axis, half, num_tokens - half)[0].movedim(axis - 1, 0).movedim(-1, axis)
