"""Choosing the tokens of a verification step: the rules of services.engine.acceptance on real scores and noise.

Owns: which variate goes where. Must not know: how scores were made, what becomes of the tokens.
Invariant: every draw at an absolute index has a purpose of its own: accept, residual and target are independent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.common.values import VerificationMethod
from services.engine import acceptance, noise
from services.engine.noise import NoiseKeys, Purpose
from services.engine.noise_torch import KeyTensors, gumbel_argmax
from services.engine.transfer import to_device
from services.engine.verify_batch import VerifyBatch


class Outcome(NamedTuple):
    """Of S sequences: in each line of `token_ids` [S, K + 1] the first num_accepted + 1 stand; num_accepted is [S]."""

    token_ids: Tensor
    num_accepted: Tensor


def choose(batch: VerifyBatch, scores: Tensor, untrusted_drafts: bool) -> tuple[Outcome, npt.NDArray[np.bool_]]:
    """The tokens of every sequence from processed scores [R, V], and [S] whether an invalid row was replaced."""
    num_sequences, width = batch.drafted.shape
    token_ids = torch.zeros((num_sequences, width + 1), dtype=torch.int64, device=scores.device)
    num_accepted = torch.zeros(num_sequences, dtype=torch.int64, device=scores.device)
    replaced = np.zeros(num_sequences, dtype=np.bool_)
    methods = batch.methods
    for group in ((None,), (VerificationMethod.COUPLED,), (VerificationMethod.REJECTION, VerificationMethod.THRESHOLD)):
        lines = np.flatnonzero([method in group for method in methods])
        if not len(lines):
            continue
        part = batch.take(lines)
        if VerificationMethod.REJECTION in group:
            outcome, replaced[lines] = _choose_drawn(part, scores, untrusted_drafts)
        else:
            outcome = _choose_coupled(part, scores, greedy=None in group)
        at = to_device(lines, scores.device)
        token_ids[at], num_accepted[at] = outcome.token_ids, outcome.num_accepted
    return Outcome(token_ids, num_accepted), replaced


def _choose_coupled(batch: VerifyBatch, scores: Tensor, greedy: bool) -> Outcome:
    """The target's choice at every place, whatever was drafted; accepted is what agrees."""
    device, real = scores.device, batch.real
    rows = batch.rows[real]
    mine = scores if len(rows) == len(scores) else scores[to_device(rows, device)]
    if greedy:
        chosen = mine.argmax(dim=1)
    else:
        seeds, forks = np.broadcast_to(batch.seeds, real.shape), np.broadcast_to(batch.forks, real.shape)
        purposes = np.full(len(rows), Purpose.COUPLED, dtype=np.int64)
        parts = (seeds[real], batch.indices[real], purposes, forks[real])
        chosen = gumbel_argmax(mine, KeyTensors(*(to_device(part, device) for part in parts)))
    first_chosen = np.cumsum(batch.lens + 1) - (batch.lens + 1)
    token_ids = chosen[to_device(first_chosen[:, None] + batch.places, device)]
    accepted = acceptance.coupled(to_device(batch.drafted, device), token_ids[:, :-1])
    return Outcome(token_ids, acceptance.count_accepted(accepted, to_device(batch.lens, device)))


def _choose_drawn(batch: VerifyBatch, scores: Tensor, untrusted_drafts: bool) -> tuple[Outcome, npt.NDArray[np.bool_]]:
    """Rejection and threshold: accept or not at every drafted token, then one draw a sequence from where that ends."""
    device, (num_sequences, width) = scores.device, batch.drafted.shape
    drafted, lens = to_device(batch.drafted, device), to_device(batch.lens, device)
    rejecting = to_device(np.array([m is VerificationMethod.REJECTION for m in batch.methods]), device)
    rows, replaced = _check_rows(batch, scores, untrusted_drafts)

    target_probs = scores[to_device(batch.rows[:, :width], device), drafted].double().exp()
    keys = NoiseKeys(batch.seeds, batch.indices[:, :width], Purpose.ACCEPT, batch.forks)
    u = to_device(noise.uniform(noise.words(keys, 0)), device)
    accepted = torch.where(
        rejecting[:, None],
        acceptance.rejection(target_probs, rows.drafted_probs, u),
        acceptance.threshold(target_probs),
    )
    num_accepted = acceptance.count_accepted(accepted, lens)
    rejected = rejecting & (num_accepted < lens)

    ends = scores[to_device(batch.first_rows, device) + num_accepted]
    if width:
        at = torch.arange(num_sequences, device=device), num_accepted.clamp(max=width - 1)
        remaining = acceptance.residual(ends, rows.token_ids[at], rows.probs[at])
        ends = torch.where(rejected[:, None], remaining, ends)
    purposes = torch.where(rejected, int(Purpose.RESIDUAL), int(Purpose.TARGET))
    indices = to_device(batch.indices[:, 0], device) + num_accepted
    seeds, forks = to_device(batch.seeds[:, 0], device), to_device(batch.forks[:, 0], device)
    own = gumbel_argmax(ends, KeyTensors(seeds, indices, purposes, forks))

    is_own = torch.arange(width + 1, device=device)[None] >= num_accepted[:, None]
    padded = torch.cat([drafted, own[:, None]], dim=1)
    return Outcome(torch.where(is_own, own[:, None], padded), num_accepted), replaced


class _Rows(NamedTuple):
    """What each drafted token was drawn from: ids and float32 probabilities [S, K, L], its own probability [S, K]."""

    token_ids: Tensor
    probs: Tensor
    drafted_probs: Tensor


def _check_rows(batch: VerifyBatch, scores: Tensor, untrusted: bool) -> tuple[_Rows, npt.NDArray[np.bool_]]:
    """The rows on the device, and [S] whether one was replaced. Only rejection looks at what was sent."""
    shape, device = batch.drafted.shape, scores.device
    trusted = np.array([m is VerificationMethod.REJECTION and not untrusted for m in batch.methods]).repeat(shape[1])
    sent = [row if trust else None for row, trust in zip(batch.draft_rows, trusted, strict=True)]
    rows = acceptance.check_rows(batch.drafted.ravel(), sent, scores.shape[1])
    token_ids = to_device(rows.token_ids, device).view(*shape, rows.token_ids.shape[1])
    probs = to_device(rows.probs, device).view(token_ids.shape)
    drafted_probs = to_device(rows.drafted_probs, device).view(shape)
    return _Rows(token_ids, probs, drafted_probs), np.logical_or.reduce(rows.replaced.reshape(shape), axis=1)
