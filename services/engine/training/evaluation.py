"""How good a student is, on self-play that it was not trained on.

Owns: the figures and their meaning. Must not know: how it was trained, engines. The target's tokens are given, the
student says what would come next at each of them. Where the target decoded greedily that is what happens in service: a
draft token is judged only behind accepted ones, which are the target's own, so walking along an answer gives the very
acceptance lengths of serving it (up to rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.training.conversation import Origin
from services.engine.training.corpus import ANSWERS, collate, origins_of
from services.engine.training.losses import acceptance, forward_kl, lesson
from services.engine.training.shards import Transcript
from services.engine.training.student import Student

_NGRAM_LEN = 16
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Figures:
    """Over answers. `greedy` ones were decoded at temperature 0, `warm` ones at 1."""

    loss: float
    """Forward KL, nats a token."""
    greedy_acceptance: float
    """Share of greedy tokens that the student puts first."""
    warm_acceptance: float
    """Expected share of its draws that rejection accepts."""
    mean_acceptance_len: float
    """Tokens a verify step, the target's own included, greedy, at the draft length asked for."""
    mean_acceptance_len_no_loops: float
    """The same, without what stands behind an answer's first repeated 16-gram."""
    conditional_acceptance: tuple[float, ...]
    """Greedy, by position in the draft, of those verified there."""
    num_tokens: int


@torch.no_grad()
def evaluate(
    student: Student, transcripts: Sequence[Transcript], place_of: Tensor, num_draft_tokens: int, device: torch.device
) -> Figures:
    """In float32, a conversation at a time."""
    losses, shares, hits, origins, fresh = [], [], [], [], []
    for transcript in transcripts:
        batch = collate([transcript]).to(device)
        passes = student.passes(batch, num_draft_tokens)
        every = [student.logits(hidden[batch.sequences, batch.positions]) for hidden in passes]
        logits = every[0]
        taught = lesson(batch.row_ids, batch.row_log_probs, batch.tails, place_of)
        losses.append(forward_kl(logits, taught).cpu().numpy())
        shares.append(acceptance(logits, taught).cpu().numpy())
        best = student.head_ids.to(device)[torch.stack([each.argmax(dim=1) for each in every], 1)]
        hits.append((best == batch.tokens[batch.sequences, batch.positions + 1, None]).cpu().numpy())
        origins.append(origins_of([transcript]))
        fresh.append(_before_loops(transcript))
    walked = [run[ok] for run, ok, _ in _greedy_runs(hits, origins, fresh)]
    all_runs = [run for run, _, _ in _greedy_runs(hits, origins, fresh)]
    origin, hit = np.concatenate(origins), np.concatenate(hits)[:, 0]
    answers, warm = np.isin(origin, ANSWERS), origin == Origin.WARM
    lens, reached, accepted = walk(all_runs, num_draft_tokens)
    return Figures(
        loss=_mean(np.concatenate(losses)[answers]),
        greedy_acceptance=_mean(hit[origin == Origin.GREEDY]),
        warm_acceptance=_mean(np.concatenate(shares)[warm]),
        mean_acceptance_len=lens,
        mean_acceptance_len_no_loops=walk(walked, num_draft_tokens)[0],
        conditional_acceptance=tuple((accepted / np.maximum(reached, 1)).round(4).tolist()),
        num_tokens=int(answers.sum()),
    )


def walk(runs: Sequence[Flags], num_draft_tokens: int) -> tuple[float, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Serves answers of which each token was foreseen or not: tokens a step, and by position verified and accepted.

    A run is [length, places]: whether a token is foreseen at each place in a draft, the last column counting for all
    places beyond.
    """
    reached, accepted = (np.zeros(num_draft_tokens, dtype=np.int64) for _ in range(2))
    num_tokens = num_steps = 0
    for run in runs:
        at = 0
        while at < len(run):
            places = np.arange(min(num_draft_tokens, len(run) - at))
            draft = run[at + places, np.minimum(places, run.shape[1] - 1)]
            num_accepted = len(draft) if draft.all() else int(draft.argmin())
            reached[: min(num_accepted + 1, len(draft))] += 1
            accepted[:num_accepted] += 1
            num_tokens += min(num_accepted + 1, len(run) - at)
            num_steps += 1
            at += num_accepted + 1
    return num_tokens / max(num_steps, 1), reached, accepted


def _greedy_runs(
    hits: list[Flags], origins: list[npt.NDArray[np.uint8]], fresh: list[Flags]
) -> list[tuple[Flags, Flags, int]]:
    """For every greedy answer: which tokens were foreseen, and which stand before its first repetition."""
    runs = []
    for i, (hit, origin, ok) in enumerate(zip(hits, origins, fresh, strict=True)):
        greedy = origin == Origin.GREEDY
        edges = np.flatnonzero(np.diff(np.concatenate([[False], greedy, [False]]).astype(np.int8)))
        runs += [(hit[a:b], ok[a:b], i) for a, b in edges.reshape(-1, 2)]
    return runs


def _before_loops(transcript: Transcript) -> Flags:
    """For every row of a conversation, whether no n-gram of _NGRAM_LEN tokens has repeated in its turn up to there."""
    origins, tokens = transcript.origins, transcript.tokens
    fresh = np.ones(len(tokens), dtype=bool)
    seen: set[bytes] = set()
    start, looping = 0, False
    for i in range(len(tokens)):
        if i and origins[i] != origins[i - 1]:
            seen, start, looping = set(), i, False
        if i + 1 - start >= _NGRAM_LEN:
            ngram = tokens[i + 1 - _NGRAM_LEN : i + 1].tobytes()
            looping = looping or ngram in seen
            seen.add(ngram)
        fresh[i] = not looping
    kept: Flags = fresh[1:][origins[1:] != Origin.GIVEN]
    return kept


def _mean(values: npt.NDArray[np.generic]) -> float:
    return float(values.mean()) if len(values) else 0.0
