"""Which drafted tokens stand, and what the target says where they end: the mathematics of verification.

Owns: the accept rules, the residual, the checks of a draft's rows, the end at EOS and budget. Must not know: sequences,
models, where noise comes from: every variate is an argument. Functions are pure, over S sequences with up to K drafted
tokens each, padded; `lens` [S] tells how many are real.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.common.values import MAX_DRAFT_ROW_LEN, THRESHOLD, SparseRow

MAX_SUM_ERROR = 1e-4
"""How far from 1 the probabilities of a valid row may sum."""


def count_accepted(accepted: Tensor, lens: Tensor) -> Tensor:
    """Length of the accepted prefix, int64 [S], from bool [S, K]."""
    position = torch.arange(accepted.shape[1], device=accepted.device)[None]
    return (accepted & (position < lens[:, None])).long().cumprod(dim=1).sum(dim=1)


# Coupled (Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative decoding", 2024).
# The target's token is argmax(log target_probs + g) with g fixed by seed and position. It is emitted whatever the draft
# said; a draft that guessed it with the same g merely saves a forward. Greedy is g = 0.
def coupled(drafted: Tensor, chosen: Tensor) -> Tensor:
    """Accepts drafted [S, K] where it is what the target chose, [S, K]."""
    return drafted == chosen


# Rejection (Leviathan et al., ICML 2023, algorithm 1; Chen et al. 2023, theorem 1).
# x ~ draft_probs is accepted with probability min(1, target_probs[x] / draft_probs[x]), u being uniform; on a rejection
# the token is drawn from max(0, target_probs - draft_probs), normalised. What is emitted then has target_probs exactly.
def rejection(target_probs: Tensor, draft_probs: Tensor, u: Tensor) -> Tensor:
    """Accepts where u < target_probs / draft_probs: float64 [S, K], the probabilities of the drafted tokens."""
    return u * draft_probs < target_probs


# Threshold (lossy: the rule of many tutorials).
# x is accepted while target_probs[x] > 0.1, however it was drawn; else the token is drawn from target_probs. The result
# has no simple distribution; it favours whatever the draft says among the likely tokens.
def threshold(target_probs: Tensor) -> Tensor:
    """Accepts where the target gives the drafted token more than THRESHOLD, [S, K]."""
    return target_probs > THRESHOLD


# The residual: log max(0, target_probs - draft_probs), unnormalised, as a Gumbel argmax needs no normalisation.
# A point mass at x leaves target_probs without x. Where nothing is left (draft_probs covers target_probs up to
# rounding, so that the rejection had probability zero) the token comes from target_probs.
def residual(scores: Tensor, row_ids: Tensor, row_probs: Tensor) -> Tensor:
    """Scores [S, V] of the token behind a rejection; the draft's rows are ids and float32 probabilities [S, L]."""
    positive = scores.exp().scatter_add(1, row_ids, -row_probs).clamp(min=0.0)
    return torch.where(positive.amax(dim=1, keepdim=True) > 0.0, positive.log(), scores)


class DraftRows(NamedTuple):
    """What N drafted tokens were drawn from, checked: a point mass where there was no valid row."""

    token_ids: npt.NDArray[np.int64]
    """[N, L], padded with entries of probability 0."""
    probs: npt.NDArray[np.float32]
    drafted_probs: npt.NDArray[np.float64]
    """[N]: the probability of the drafted token itself, above 0."""
    replaced: npt.NDArray[np.bool_]
    """[N]: a row was sent and is not valid."""


def check_rows(tokens: npt.NDArray[np.int64], rows: list[SparseRow | None], vocab_size: int) -> DraftRows:
    """Checks the row of each drafted token [N]; None means that the token was chosen deterministically.

    Invalid: an id outside the vocabulary, an id twice, a probability that is negative or not finite, a sum off by more
    than MAX_SUM_ERROR, the drafted token absent or at 0, more than MAX_DRAFT_ROW_LEN entries.
    """
    sound = [row if row is not None and _well_formed(row) else SparseRow((), ()) for row in rows]
    lens = np.array([len(row.token_ids) for row in sound], dtype=np.int64)
    width = max(1, int(lens.max(initial=0)))
    filled = np.arange(width)[None] < lens[:, None]
    # Padding ids are distinct and negative, so that they collide with nothing.
    ids = np.broadcast_to(-1 - np.arange(width), (len(sound), width)).copy()
    ids[filled] = np.fromiter(chain.from_iterable(row.token_ids for row in sound), dtype=np.int64)
    probs = np.zeros((len(sound), width), dtype=np.float32)
    with np.errstate(over="ignore"):
        probs[filled] = np.fromiter(chain.from_iterable(row.probs for row in sound), dtype=np.float32)

    ordered = np.sort(ids, axis=1)
    valid = (lens > 0) & (~filled | ((ids >= 0) & (ids < vocab_size))).all(axis=1)
    valid &= (ordered[:, 1:] != ordered[:, :-1]).all(axis=1)
    valid &= (np.isfinite(probs) & (probs >= 0.0)).all(axis=1)
    probs[~valid] = 0.0
    valid &= np.abs(probs.sum(axis=1, dtype=np.float64) - 1.0) <= MAX_SUM_ERROR
    drafted_probs = np.where(ids == tokens[:, None], probs, 0.0).sum(axis=1, dtype=np.float64)
    valid &= drafted_probs > 0.0

    ids[~filled] = 0
    ids[~valid], probs[~valid] = 0, 0.0
    ids[~valid, 0], probs[~valid, 0], drafted_probs[~valid] = tokens[~valid], 1.0, 1.0
    sent = np.array([row is not None for row in rows], dtype=np.bool_)
    return DraftRows(ids, probs, drafted_probs, sent & ~valid)


def _well_formed(row: SparseRow) -> bool:
    return len(row.token_ids) == len(row.probs) <= MAX_DRAFT_ROW_LEN


def end(
    token_ids: tuple[int, ...], num_accepted: int, eos_token_ids: frozenset[int], num_remaining_tokens: int
) -> tuple[tuple[int, ...], int]:
    """Cuts accepted tokens and the target's own behind the first EOS and at the budget, and the count with them."""
    ends = (i + 1 for i, token in enumerate(token_ids) if token in eos_token_ids)
    kept = token_ids[: min(next(ends, len(token_ids)), num_remaining_tokens)]
    return kept, min(num_accepted, len(kept))
