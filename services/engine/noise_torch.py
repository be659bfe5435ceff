"""The noise of services.engine.noise for tensors, on whichever device they lie.

Owns: the same words in int64 arithmetic, which torch has on every device, and the argmax under noise. Must not know:
what is sampled. Invariant: words are bit-identical to numpy's; a logarithm may differ in its last float64 bit between
devices, which changes the float32 rounding of about one variate in 10^8. Tensors in host memory take numpy's path.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from services.engine import noise

_CHUNK_LEN = 1 << 25
"""Scores taken at a time on a device: bounds the memory of the intermediate tensors to about 2 GiB."""


class KeyTensors(NamedTuple):
    """Addresses of the noise of R rows, int64 tensors [R]; a seed is its 64 bits read as a signed number."""

    seeds: Tensor
    indices: Tensor
    purposes: Tensor
    forks: Tensor

    def take(self, rows: Tensor | slice) -> KeyTensors:
        return KeyTensors(*(part[rows] for part in self))


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As noise.philox, for int64 tensors. A product's overflow wraps, so its 32-bit halves come out right."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    mask = noise.WORD_MASK
    for _ in range(noise.NUM_ROUNDS):
        product0, product1 = x0 * noise.MULTIPLIERS[0], x2 * noise.MULTIPLIERS[1]
        x0, x1 = ((product1 >> 32) & mask) ^ x1 ^ key0, product1 & mask
        x2, x3 = ((product0 >> 32) & mask) ^ x3 ^ key1, product0 & mask
        key0, key1 = (key0 + noise.KEY_STEPS[0]) & mask, (key1 + noise.KEY_STEPS[1]) & mask
    return x0, x1, x2, x3


def words(keys: KeyTensors, vocab_size: int) -> Tensor:
    """The words of token ids [0, vocab_size) for every row: int64 [R, vocab_size], 32 bits each."""
    mask = noise.WORD_MASK
    seeds, indices, purposes, forks = (part[:, None] for part in keys)
    blocks = torch.arange(-(-vocab_size // 4), dtype=torch.int64, device=seeds.device)[None]
    counter = (indices & mask, blocks, purposes & mask, forks & mask)
    out = torch.stack(philox(counter, (seeds & mask, (seeds >> 32) & mask)), dim=2)
    return out.flatten(1)[:, :vocab_size]


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel variates, float32."""
    return (-torch.log(-torch.log((words.double() + 0.5) / 2.0**32))).float()


def gumbel_argmax(scores: Tensor, keys: KeyTensors) -> Tensor:
    """As noise.gumbel_argmax: float32 log-probabilities [R, V] to int64 token ids [R]. No transfer off a device."""
    if scores.device.type == "cpu":
        seeds, indices, purposes, forks = (part.numpy() for part in keys)
        chosen = noise.gumbel_argmax(scores.numpy(), noise.NoiseKeys(seeds.view("uint64"), indices, purposes, forks))
        return torch.from_numpy(chosen)
    return gumbel_argmax_on_device(scores, keys)


def gumbel_argmax_on_device(scores: Tensor, keys: KeyTensors) -> Tensor:
    """gumbel_argmax in tensor operations alone."""
    num_rows, vocab_size = scores.shape
    stride = max(1, _CHUNK_LEN // vocab_size)
    chunks = [slice(start, start + stride) for start in range(0, num_rows, stride)]
    if not chunks:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    return torch.cat([(scores[c] + gumbel(words(keys.take(c), vocab_size))).argmax(dim=1) for c in chunks])
