"""The layout of a verification step on the host: which rows of the logits belong to which place of which sequence.

Owns: the index arithmetic and the addresses of the noise. Must not know: torch, scores, acceptance.
Place i of a sequence is absolute index len(tokens) + i; it has a row of logits, and a drafted token where i < lens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from services.common.values import SparseRow, VerificationMethod
from services.engine.step import Work

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class VerifyBatch:
    """S works with rows. K is the longest proposal of the step; shorter ones are padded with token 0."""

    works: list[Work]
    first_rows: Ints
    """[S]: the row of place 0; those of the further places follow."""
    drafted: Ints
    """[S, K]."""
    lens: Ints
    """[S]: drafted tokens that count."""

    @classmethod
    def of(cls, works: list[Work], vocab_size: int) -> VerifyBatch:
        """Lays out works whose rows follow each other. A proposal ends before an id that is outside the vocabulary."""
        known = [tuple(takewhile(lambda token: 0 <= token < vocab_size, work.drafted)) for work in works]
        lens = np.array([len(tokens) for tokens in known], dtype=np.int64)
        drafted = np.zeros((len(works), int(lens.max(initial=0))), dtype=np.int64)
        for line, tokens in zip(drafted, known, strict=True):
            line[: len(tokens)] = tokens
        num_rows = np.array([work.num_rows for work in works], dtype=np.int64)
        return cls(works, np.cumsum(num_rows) - num_rows, drafted, lens)

    def take(self, lines: Ints) -> VerifyBatch:
        """The sequences at `lines`, with the same width."""
        works = [self.works[line] for line in lines]
        return VerifyBatch(works, self.first_rows[lines], self.drafted[lines], self.lens[lines])

    @property
    def places(self) -> Ints:
        """[S, K + 1]: each line counts 0, 1, ... and stays at its last place where the proposal is shorter than K."""
        return np.minimum(np.arange(self.drafted.shape[1] + 1)[None], self.lens[:, None])

    @property
    def rows(self) -> Ints:
        """[S, K + 1]: the row of each of `places`."""
        return self.first_rows[:, None] + self.places

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        """[S, K + 1]: which of `places` are not a repetition."""
        return np.arange(self.drafted.shape[1] + 1)[None] <= self.lens[:, None]

    @property
    def indices(self) -> Ints:
        """[S, K + 1]: the absolute index of each of `places`."""
        return np.array([len(work.sequence.tokens) for work in self.works], dtype=np.int64)[:, None] + self.places

    @property
    def seeds(self) -> npt.NDArray[np.uint64]:
        """[S, 1]."""
        return np.array([work.sequence.sampling.seed for work in self.works], dtype=np.uint64)[:, None]

    @property
    def forks(self) -> Ints:
        """[S, 1]."""
        return np.array([work.sequence.fork for work in self.works], dtype=np.int64)[:, None]

    @property
    def methods(self) -> list[VerificationMethod | None]:
        """None: greedy, whatever the sequence asks for."""
        return [None if w.sequence.sampling.greedy else w.sequence.verification for w in self.works]

    @property
    def draft_rows(self) -> list[SparseRow | None]:
        """S * K entries, line by line: None beyond the proposal, and for a token that the draft says it chose."""
        width = self.drafted.shape[1]
        rows: list[SparseRow | None] = []
        for work in self.works:
            sent = work.proposal.rows if work.proposal else None
            if sent is not None:
                num_missing = max(0, len(work.drafted) - len(sent))
                sent = (*sent, *[SparseRow((), ())] * num_missing)[:width]
            rows += [*(sent or ()), *[None] * (width - len(sent or ()))]
        return rows
