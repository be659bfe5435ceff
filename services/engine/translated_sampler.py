"""Sampling for a draft whose vocabulary is not the target's.

Owns: the way from logits over the draft's own tokens to logits over the target's. Must not know: drafters, text, how a
token is chosen from logits.

    among shared tokens   the logits of the shared tokens move to the target's ids, duplicates are summed as
                          probabilities, all other ids have none; then as any draft, in the target's ids
    by text               the most likely own token, for greedy sequences alone
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from services.engine.logits_check import check_num_rows, nonfinite_rows
from services.engine.own_sequence import OwnSequence
from services.engine.paged_model import LogitsSampler
from services.engine.step import Sampled, Work
from services.engine.transfer import to_device, to_host
from services.engine.vocabulary_pair import VocabularyPair

_NO_LOGIT = -1e30
"""Of ids that the draft has no token for: finite, as logits must be, and of probability 0 at any temperature."""


class TranslatingSampler:
    """A LogitsSampler for OwnSequences. A Sampled holds a target id, or an own id where the sequence drafts by text."""

    def __init__(self, sampler: LogitsSampler, pair: VocabularyPair) -> None:
        self._sampler = sampler
        self._draft_size = pair.draft.size
        self._target_size = pair.target.size
        self._layers = _layers(pair)

    def sample(self, works: list[Work], logits: Tensor) -> list[Sampled | None]:
        """As services.engine.sampler.Sampler."""
        asking = [work for work in works if work.num_rows]
        check_num_rows(asking, logits)
        if not asking:
            return [None] * len(works)
        (nonfinite,) = to_host([nonfinite_rows(logits)])
        by_text = np.array([_own(work).by_text for work in asking])
        sampled: dict[int, Sampled | None] = {}
        if by_text.any():
            lines = np.flatnonzero(by_text)
            best = logits[to_device(lines, logits.device), : self._draft_size].argmax(dim=1)
            sampled |= {int(i): Sampled(int(own), None) for i, own in zip(lines, best.tolist(), strict=True)}
        if not by_text.all():
            lines = np.flatnonzero(~by_text)
            translated = self.translate(logits[to_device(lines, logits.device)])
            targets = [replace(asking[i], sequence=_own(asking[i]).target) for i in lines]
            sampled |= dict(zip(lines.tolist(), self._sampler.sample(targets, translated), strict=True))
        answers = iter([None if flag else sampled[i] for i, flag in enumerate(nonfinite)])
        return [next(answers) if work.num_rows else None for work in works]

    def translate(self, logits: Tensor) -> Tensor:
        """Logits [R, own vocabulary] of the shared tokens at their target ids, [R, target's vocabulary]."""
        out = torch.full((len(logits), self._target_size), _NO_LOGIT, dtype=logits.dtype, device=logits.device)
        for draft_ids, target_ids in self._layers:
            own, at = logits[:, to_device(draft_ids, logits.device)], to_device(target_ids, logits.device)
            out[:, at] = torch.logaddexp(out[:, at], own)
        return out


def _own(work: Work) -> OwnSequence:
    if not isinstance(work.sequence, OwnSequence):
        raise TypeError("a translating sampler takes own sequences only")
    return work.sequence


Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


def _layers(pair: VocabularyPair) -> list[tuple[Ids, Ids]]:
    """The shared tokens as pairs of draft ids and target ids; within a layer each target id stands once."""
    columns: list[tuple[list[int], list[int]]] = []
    num_seen: dict[int, int] = {}
    for draft_id, target_id in pair.target_id_of.items():
        depth = num_seen.get(target_id, 0)
        num_seen[target_id] = depth + 1
        if depth == len(columns):
            columns.append(([], []))
        columns[depth][0].append(draft_id)
        columns[depth][1].append(target_id)
    return [(np.array(draft_ids), np.array(target_ids)) for draft_ids, target_ids in columns]
