"""Sampling on the draft: one token a sequence, and for rejection the very row that it was drawn from.

Owns: how a draft chooses. Must not know: models, drafters, the wire, the target's noise.

    greedy              argmax of the processed logits                                                  no row
    coupled             argmax(scores + g), g the noise that the target uses at this index              no row
    rejection           drawn from the MAX_DRAFT_ROW_LEN most likely, renormalised in float32           that row
    threshold           drawn as for rejection; the target looks at the token alone                     no row

Invariant: a token is never withheld because of what was sampled, and a row is exactly what its token was drawn from. A
row whose best token is too unlikely yields none at all, whatever would be sampled from it.
For rejection the sequence's seed is one derived from the request's, so that the draft cannot know the target's noise.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.common.values import MAX_DRAFT_ROW_LEN, SparseRow, VerificationMethod
from services.engine import noise
from services.engine.logits_check import check_num_rows, nonfinite_rows
from services.engine.noise import NoiseKeys, Purpose
from services.engine.noise_torch import KeyTensors, gumbel_argmax
from services.engine.processing import process, rows_of
from services.engine.step import Sampled, Work
from services.engine.transfer import to_device, to_host

Ints = npt.NDArray[np.int64]


class Sampler:
    """Samples drafted tokens. Stateless: a token is a function of its sequence and its row of logits.

    A row whose most likely token has a probability below `min_prob`, after processing, ends the proposal before it.
    """

    def __init__(self, min_prob: float = 0.0) -> None:
        self._min_prob = min_prob

    def sample(self, works: list[Work], logits: Tensor) -> list[Sampled | None]:
        """One token for each work with a row, from float32 logits [number of those, V] in the order of the works.

        None in place of a token ends that proposal, as do logits that are not finite. Raises Internal for a wrong
        number of rows.
        """
        asking = [work for work in works if work.num_rows]
        check_num_rows(asking, logits)
        if not asking:
            return [None] * len(works)
        nonfinite = nonfinite_rows(logits)
        if logits.device.type == "cpu" and nonfinite.any():  # sorting on a host takes numbers only
            logits = logits.masked_fill(nonfinite[:, None], 0.0)
        methods = [None if w.sequence.sampling.greedy else w.sequence.verification for w in asking]
        coupled = np.flatnonzero([m is VerificationMethod.COUPLED for m in methods])
        drawn = np.flatnonzero([m in (VerificationMethod.REJECTION, VerificationMethod.THRESHOLD) for m in methods])

        scores = process(logits, rows_of(asking))
        best = _choose(asking, scores, coupled)
        ends = self._ends(scores)
        flags, best_ids, row_ids, row_probs, ended = to_host([nonfinite, best, *_rows(scores, drawn), ends])

        token_ids = best_ids.astype(np.int64)
        token_ids[drawn] = _draw([asking[i] for i in drawn], row_ids.astype(np.int64), row_probs.astype(np.float32))
        rows: list[SparseRow | None] = [None] * len(asking)
        for i, ids, probs in zip(drawn, row_ids.astype(np.int64), row_probs, strict=True):
            if methods[i] is VerificationMethod.REJECTION:
                rows[i] = SparseRow(tuple(ids[probs > 0].tolist()), tuple(probs[probs > 0].tolist()))
        sampled = [
            None if end else Sampled(*found)
            for *found, end in zip(token_ids.tolist(), rows, np.logical_or(ended, flags), strict=True)
        ]
        answers = iter(sampled)
        return [next(answers) if work.num_rows else None for work in works]

    def _ends(self, scores: Tensor) -> Tensor:
        """Which rows [R] end their proposals: a function of the row alone, never of what is sampled from it."""
        if not self._min_prob:
            return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        return (scores.amax(dim=1) - torch.logsumexp(scores, dim=1)).exp() < self._min_prob


def _choose(works: list[Work], scores: Tensor, coupled: Ints) -> Tensor:
    """The argmax of every row, int64 [R], under the target's own noise where the row is one of `coupled`."""
    if not len(coupled):
        return scores.argmax(dim=1)
    seeds, indices, forks = _addresses([works[i] for i in coupled])
    parts = (seeds, indices, np.full(len(coupled), Purpose.COUPLED, dtype=np.int64), forks)
    keys = KeyTensors(*(to_device(part, scores.device) for part in parts))
    if len(coupled) == len(scores):
        return gumbel_argmax(scores, keys)
    at = to_device(coupled, scores.device)
    return scores.argmax(dim=1).index_copy(0, at, gumbel_argmax(scores[at], keys))


def _addresses(works: list[Work]) -> tuple[npt.NDArray[np.uint64], Ints, Ints]:
    """Seed, absolute index and fork of the token that each work samples, [W] each."""
    sequences = [work.sequence for work in works]
    seeds = np.array([sequence.sampling.seed for sequence in sequences], dtype=np.uint64)
    indices = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.int64)
    return seeds, indices, np.array([sequence.fork for sequence in sequences], dtype=np.int64)


def _rows(scores: Tensor, drawn: Ints) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the truncated distribution of the rows `drawn`, [number of those, L]."""
    top = scores[to_device(drawn, scores.device)].topk(min(MAX_DRAFT_ROW_LEN, scores.shape[1]), dim=1)
    return top.indices, torch.softmax(top.values, dim=1)


def _draw(works: list[Work], row_ids: Ints, row_probs: noise.Floats) -> Ints:
    """One token of each row, with exactly the probabilities that the row states."""
    seeds, indices, forks = (part[:, None] for part in _addresses(works))
    words = noise.words(NoiseKeys(seeds, indices, Purpose.DRAFT, forks), row_ids)
    with np.errstate(divide="ignore"):
        best = (np.log(row_probs) + noise.gumbel(words)).argmax(axis=1)
    return np.take_along_axis(row_ids, best[:, None], axis=1)[:, 0]
