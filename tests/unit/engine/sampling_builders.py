"""Builders for the tests of sampling and verification: sequences, works and a bigram table in place of a model."""

from __future__ import annotations

import numpy as np
import torch

from services.common.items import Identity
from services.common.values import Proposal, SamplingParams, SparseRow, VerificationMethod
from services.engine.sequence import Sequence
from services.engine.step import Work

torch.set_num_threads(1)


def sequence(
    tokens: list[int],
    sampling: SamplingParams | None = None,
    verification: VerificationMethod = VerificationMethod.COUPLED,
    *,
    prompt_len: int | None = None,
    eos: frozenset[int] = frozenset(),
    budget: int = 100,
    log_probs: bool = False,
    num_top_log_probs: int = 0,
    fork: int = 0,
) -> Sequence:
    return Sequence(
        identity=Identity("session", 1, 1, 0, len(tokens)),
        tokens=tokens,
        prompt_len=len(tokens) if prompt_len is None else prompt_len,
        eos_token_ids=eos,
        sampling=sampling or SamplingParams(),
        verification=verification,
        max_len=len(tokens) + budget,
        log_probs=log_probs,
        num_top_log_probs=num_top_log_probs,
        fork=fork,
        num_cached=len(tokens) - 1,
    )


def work(seq: Sequence, drafted: tuple[int, ...] = (), rows: tuple[SparseRow | None, ...] | None = None) -> Work:
    proposal = Proposal(1, drafted, rows) if drafted else None
    return Work(seq, num_new_tokens=1, proposal=proposal, num_rows=1 + len(drafted))


class TableModel:
    """Logits of the next token as a function of the last one: [vocab_size, vocab_size], drawn once."""

    def __init__(self, vocab_size: int, seed: int, spread: float = 2.0) -> None:
        drawn = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size)) * spread
        self.table = torch.from_numpy(drawn.astype(np.float32))

    def logits(self, works: list[Work]) -> torch.Tensor:
        last = [token for w in works if w.num_rows for token in (w.sequence.tokens[-1], *w.drafted)]
        return self.table[torch.tensor(last, dtype=torch.int64)]
