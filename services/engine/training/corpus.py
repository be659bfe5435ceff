"""Self-play as training reads it: conversations by number, in batches whose order a seed and an epoch determine.

Owns: which conversations are held out, the vocabulary that their frequencies give, and the batches. Must not know:
models, how the files are laid out (shards).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from services.common.errors import ConfigError
from services.engine.training.conversation import Origin
from services.engine.training.shards import ShardReader, Transcript, has_row

HELD_OUT_EVERY = 25
"""Of so many conversations one is never trained on."""
_LEN_STEP = 64
"""Conversations are batched with others of about their length: padding is computed too."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations side by side, padded at their ends; P positions have a row to be learnt from.

    The hidden state at (sequences[p], positions[p]) predicts the token behind it, whose distribution is row p.
    """

    tokens: torch.Tensor
    """int64 [B, T]"""
    sequences: torch.Tensor
    positions: torch.Tensor
    """int64 [P] each"""
    row_ids: torch.Tensor
    """int64 [P, L]"""
    row_log_probs: torch.Tensor
    """float32 [P, L]"""
    tails: torch.Tensor
    """float32 [P]"""
    num_tokens: int
    """Without padding."""
    answered: torch.Tensor
    """bool [B, T]: which tokens are of answers."""
    features: torch.Tensor | None = None
    """float16 [B, T, H]: before each token that was drawn the target's final hidden state, elsewhere zeros."""

    def to(self, device: torch.device) -> Batch:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        moved = {name: t.to(device, non_blocking=True) for name, t in tensors.items() if t is not None}
        return replace(self, **moved)


_TENSORS = ("tokens", "sequences", "positions", "row_ids", "row_log_probs", "tails", "answered", "features")


class Corpus:
    """The conversations of some shards, in their order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises ConfigError where there is too little to train on and to hold out."""
        self.names = tuple(path.name for path in paths)
        self._readers = [ShardReader(path) for path in paths]
        self._index = [(reader, i) for reader in self._readers for i in range(reader.num_conversations)]
        self._lens = np.array([reader.len_of(i) for reader, i in self._index], dtype=np.int64)
        numbers = np.arange(len(self._index))
        held_out = numbers % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
        self.training, self.held_out = numbers[~held_out], numbers[held_out]
        if not len(self.training) or not len(self.held_out):
            raise ConfigError(f"self_play: {len(numbers)} conversations are too few to train on and to hold some out")

    @property
    def num_tokens(self) -> int:
        return int(self._lens.sum())

    def transcript(self, number: int) -> Transcript:
        reader, i = self._index[number]
        return reader.transcript(i)

    def batches(self, seed: int, epoch: int, batch_tokens: int) -> list[npt.NDArray[np.int64]]:
        """The training conversations in an order of chance, as batches of at most `batch_tokens` or of one."""
        rng = np.random.default_rng([seed, epoch])
        numbers = self.training[rng.permutation(len(self.training))]
        by_len = numbers[np.argsort(-(-self._lens[numbers] // _LEN_STEP), kind="stable")]
        found, start = [], 0
        for end in range(1, len(by_len) + 1):
            if end == len(by_len) or self._lens[by_len[start : end + 1]].max() * (end + 1 - start) > batch_tokens:
                found.append(by_len[start:end])
                start = end
        return [found[i] for i in rng.permutation(len(found))]

    def token_mass(self, vocab_size: int) -> npt.NDArray[np.float64]:
        """How often the target expects each token where the corpus has rows."""
        mass = np.zeros(vocab_size)
        for reader in self._readers:
            ids, log_probs = reader.row_ids(), reader.row_log_probs()
            probs = np.exp(log_probs.astype(np.float32)).ravel()
            mass += np.bincount(ids.ravel().astype(np.int64), weights=probs, minlength=vocab_size)
        return mass


def head_tokens(mass: npt.NDArray[np.float64], num: int, always: frozenset[int]) -> npt.NDArray[np.int64]:
    """The `num` tokens of greatest mass, `always` among them, in rising order; of equals the lowest ids."""
    ranked = mass.copy()
    ranked[list(always)] = np.inf
    return np.sort(np.argsort(-ranked, kind="stable")[:num])


def collate(transcripts: Sequence[Transcript]) -> Batch:
    """Lays conversations side by side. Rows of tokens at index 0, which nothing predicts, are left out."""
    longest = max(len(t.tokens) for t in transcripts)
    tokens = np.zeros((len(transcripts), longest), dtype=np.int64)
    answered = np.zeros_like(tokens, dtype=bool)
    sequences, positions, rows = [], [], []
    for i, transcript in enumerate(transcripts):
        tokens[i, : len(transcript.tokens)] = transcript.tokens
        answered[i, : len(transcript.tokens)] = np.isin(transcript.origins, ANSWERS)
        at = np.flatnonzero(has_row(transcript.origins))
        kept = at > 0
        sequences.append(np.full(int(kept.sum()), i))
        positions.append(at[kept] - 1)
        rows.append([part[kept] for part in transcript.rows])
    ids, log_probs, tails = (np.concatenate(part) for part in zip(*rows, strict=True))
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(np.concatenate(sequences)),
        torch.from_numpy(np.concatenate(positions)),
        torch.from_numpy(ids.astype(np.int64)),
        torch.from_numpy(log_probs.astype(np.float32)),
        torch.from_numpy(tails.astype(np.float32)),
        sum(len(t.tokens) for t in transcripts),
        torch.from_numpy(answered),
        _features(transcripts, longest),
    )


def _features(transcripts: Sequence[Transcript], longest: int) -> torch.Tensor | None:
    """Of Batch; None where a conversation was kept without."""
    kept = [t.features for t in transcripts if t.features is not None]
    if len(kept) < len(transcripts):
        return None
    features = torch.zeros(len(transcripts), longest, kept[0].shape[1], dtype=torch.float16)
    for line, transcript, rows in zip(features, transcripts, kept, strict=True):
        line[torch.from_numpy(np.flatnonzero(has_row(transcript.origins)))] = torch.from_numpy(rows)
    return features


def origins_of(transcripts: Sequence[Transcript]) -> npt.NDArray[np.uint8]:
    """Of the rows of `collate`, in their order."""
    kept = [t.origins[1:][has_row(t.origins[1:])] for t in transcripts]
    return np.concatenate(kept) if kept else np.zeros(0, np.uint8)


ANSWERS = (Origin.GREEDY, Origin.COOL, Origin.WARM)
