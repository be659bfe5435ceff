"""The noise that sampling is driven by: a pure function of seed, position, token, purpose and fork.

Owns: counter-based random words (Philox), the uniform and Gumbel variates made of them, and the argmax under Gumbel
noise, which draws from a softmax (Gumbel-max trick). Must not know: torch, logits processing, sequences. Invariant: the
same arguments give the same bits on every machine; values.NOISE_VERSION changes whenever any of them would.

    key     = seed, low word then high word
    counter = (absolute token index, token id >> 2, purpose, fork)        output word = token id & 3
    u       = (word + 1/2) / 2^32        g = -log(-log u), in float64, rounded to float32

Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
IntsLike = npt.ArrayLike

NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD_MASK = 0xFFFFFFFF

_CHUNK_LEN = 1 << 16
"""Scores that `gumbel_argmax` takes at a time, so that its intermediate arrays stay in the processor's cache."""


class Purpose(enum.IntEnum):
    """What a word is used for. Distinct purposes are independent of each other."""

    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    TARGET = 4
    COUPLED = 5


class NoiseKeys(NamedTuple):
    """Addresses of the noise of R rows: sequences of R integers each, or one integer for all rows."""

    seeds: IntsLike
    """64-bit."""
    indices: IntsLike
    """Absolute index of the token that the row chooses."""
    purposes: IntsLike
    forks: IntsLike = 0


def philox(counter: Sequence[Counts], key: Sequence[Counts]) -> tuple[Counts, Counts, Counts, Counts]:
    """Philox 4x32-10 of counters (4 arrays) under keys (2 arrays): 32-bit words in uint64, broadcast together."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    mask, half = np.uint64(WORD_MASK), np.uint64(32)
    multiplier0, multiplier1 = (np.uint64(m) for m in MULTIPLIERS)
    for _ in range(NUM_ROUNDS):
        product0, product1 = x0 * multiplier0, x2 * multiplier1
        x0, x1 = (product1 >> half) ^ x1 ^ key0, product1 & mask
        x2, x3 = (product0 >> half) ^ x3 ^ key1, product0 & mask
        key0, key1 = (key0 + np.uint64(KEY_STEPS[0])) & mask, (key1 + np.uint64(KEY_STEPS[1])) & mask
    return x0, x1, x2, x3


def block_words(keys: NoiseKeys, blocks: IntsLike) -> Words:
    """Words of the tokens [4 * block, 4 * block + 4): shape (..., 4) for keys and blocks that broadcast to (...)."""
    seeds, indices, blocks, purposes, forks = np.broadcast_arrays(
        _counts(keys.seeds), _counts(keys.indices), _counts(blocks), _counts(keys.purposes), _counts(keys.forks)
    )
    mask, half = np.uint64(WORD_MASK), np.uint64(32)
    out = philox((indices & mask, blocks & mask, purposes & mask, forks & mask), (seeds & mask, seeds >> half))
    return np.stack(out, axis=-1).astype(np.uint32)


def words(keys: NoiseKeys, token_ids: IntsLike) -> Words:
    """One word for each token id; keys and token ids broadcast against each other."""
    ids = np.asarray(token_ids, dtype=np.int64)
    block = block_words(keys, ids >> 2)
    lanes = np.broadcast_to(ids & 3, block.shape[:-1])
    return np.take_along_axis(block, lanes[..., None], axis=-1)[..., 0]


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """Variates of the open unit interval."""
    return (words.astype(np.float64) + 0.5) / 2.0**32


def gumbel(words: Words) -> Floats:
    """Standard Gumbel variates, between -3.13 and 22.88."""
    return (-np.log(-np.log(uniform(words)))).astype(np.float32)


def uniform_at(seed: int, index: int, purpose: Purpose, fork: int = 0, token_id: int = 0) -> float:
    """The uniform variate of one token."""
    return float(uniform(words(NoiseKeys(seed, index, purpose, fork), token_id)))


def gumbel_row(seed: int, index: int, purpose: Purpose, token_ids: IntsLike, fork: int = 0) -> Floats:
    """The Gumbel variates of one position, for the tokens given."""
    return gumbel(words(NoiseKeys(seed, index, purpose, fork), token_ids))


def gumbel_argmax(scores: Floats, keys: NoiseKeys) -> npt.NDArray[np.int64]:
    """Draws a token from each row of float32 log-probabilities [R, V]: the one with the highest score + noise, [R].

    A row has at least one finite score and none at +inf. A block of four tokens too low to be chosen costs nothing.
    Ties go to the lowest id.
    """
    num_rows, vocab_size = scores.shape
    rows = [np.broadcast_to(_counts(part), (num_rows,)) for part in keys]
    chosen = np.empty(num_rows, dtype=np.int64)
    stride = max(1, _CHUNK_LEN // vocab_size)
    for start in range(0, num_rows, stride):
        chunk = slice(start, start + stride)
        chosen[chunk] = _argmax_chunk(scores[chunk], NoiseKeys(*(part[chunk] for part in rows)))
    return chosen


# A token reaches the bound L = best score + its noise only if g >= L - score. From -log u >= 1 - u follows
# g <= -log(1 - u), so it must have 1 - u <= exp(score - L): one exponential a token; few pass and need g itself.
# The slack covers float32 rounding of noise and sum, and keeps the choice exactly that of the plain argmax.
_SLACK = np.float32(1.001)
_MAX_GUMBEL = np.float32(23.0)
"""No variate is greater, so a score this far below the bound cannot reach it."""


def _argmax_chunk(scores: Floats, keys: NoiseKeys) -> npt.NDArray[np.int64]:
    best = scores.argmax(axis=1)
    lines = np.arange(len(scores))
    bound = scores[lines, best] + gumbel(words(keys, best))

    num_blocks = -(-scores.shape[1] // 4)
    padded = np.full((len(scores), num_blocks * 4), -np.inf, dtype=np.float32)
    padded[:, : scores.shape[1]] = scores
    blocked = padded.reshape(len(scores), num_blocks, 4)
    highest_of_block = np.maximum.reduce([padded[:, lane::4] for lane in range(4)])  # faster than over the last axis
    row, block = np.nonzero(highest_of_block >= (bound - _MAX_GUMBEL)[:, None])
    drawn = block_words(_take(keys, row), block)
    with np.errstate(under="ignore", over="ignore"):
        weight = np.exp(blocked[row, block] - bound[row, None]) * _SLACK
    survives = (~drawn).astype(np.float32) * np.float32(2.0**-32) <= weight
    survives &= blocked[row, block] > -np.inf

    at, lane = np.nonzero(survives)  # in order of row, then of token id
    row, token = row[at], block[at] * 4 + lane
    total = scores[row, token] + gumbel(drawn[at, lane])
    highest = np.maximum.reduceat(total, np.searchsorted(row, lines))
    winners = np.nonzero(total == highest[row])[0]
    return token[winners[np.searchsorted(row[winners], lines)]]


def _take(keys: NoiseKeys, rows: npt.NDArray[np.int64]) -> NoiseKeys:
    return NoiseKeys(*(np.asarray(part)[rows] for part in keys))


def _counts(values: IntsLike) -> Counts:
    return np.asarray(values, dtype=np.uint64)
