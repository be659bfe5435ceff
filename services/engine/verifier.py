"""Verification of a step: logits of many sequences, of different lengths, methods and parameters, to verdicts.

Owns: the order of verification, log-probabilities, and the one transfer off the device. Must not know: models,
schedulers, the wire. Invariant: a verdict depends on its own sequence, logits and proposal alone, never on the batch.
Greedy and coupled tokens don't depend on the proposal either, only how many of them come at once does; with rejection
the distribution doesn't.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.common.errors import OutriderError
from services.common.values import TopLogProbs
from services.engine import acceptance
from services.engine.choosing import Outcome, choose
from services.engine.logits_check import check_num_rows, nonfinite_errors, nonfinite_rows
from services.engine.processing import process, rows_of
from services.engine.step import Verdict, Work
from services.engine.transfer import to_device, to_host
from services.engine.verify_batch import VerifyBatch

Floats = npt.NDArray[np.float64]


class Verifier:
    """Verifies proposals. `untrusted_drafts` ignores their rows: a lying draft then costs acceptance, not exactness."""

    def __init__(self, untrusted_drafts: bool = False) -> None:
        self._untrusted_drafts = untrusted_drafts

    def verify(self, works: list[Work], logits: Tensor) -> list[Verdict | OutriderError | None]:
        """One verdict for each work with rows, from float32 logits [sum of num_rows, V] in the order of the works.

        In the place of a verdict stands an error where a work's logits are not finite: rows don't depend on each other.
        Raises Internal for a wrong number of rows.
        """
        asking = [work for work in works if work.num_rows]
        check_num_rows(asking, logits)
        if not asking:
            return [None] * len(works)
        nonfinite = nonfinite_rows(logits)
        if logits.device.type == "cpu" and nonfinite.any():  # sorting on a host takes numbers only
            logits = logits.masked_fill(nonfinite[:, None], 0.0)
        batch = VerifyBatch.of(asking, logits.shape[1])
        outcome, replaced = choose(batch, process(logits, rows_of(asking)), self._untrusted_drafts)
        reports = _Reports.of(batch, logits, outcome)
        flags, num_accepted, token_ids, *columns = to_host(
            [nonfinite, outcome.num_accepted, outcome.token_ids, *reports.columns]
        )
        errors = nonfinite_errors(asking, flags)

        verdicts: list[Verdict | OutriderError] = []
        for line, work in enumerate(asking):
            if line in errors:
                verdicts.append(errors[line])
                continue
            num = int(num_accepted[line])
            sequence, chosen = work.sequence, tuple(token_ids[line, : num + 1].astype(int).tolist())
            kept, num = acceptance.end(chosen, num, sequence.eos_token_ids, sequence.num_remaining_tokens)
            log_probs, tops = reports.read(columns, line, len(kept))
            verdicts.append(Verdict(kept, num, log_probs, tops, bool(replaced[line])))
        answers = iter(verdicts)
        return [next(answers) if work.num_rows else None for work in works]


@dataclass(frozen=True, slots=True)
class _Reports:
    """Log-probabilities under the raw logits, of the sequences that ask for them. `columns` lie on the device."""

    works: list[Work]
    first_rows: dict[int, int]
    """Line of the batch to its first row of the columns."""
    columns: list[Tensor]
    """Log-probabilities of the chosen tokens [Q], ids of the most likely [Q, N], theirs; nothing if nobody asks."""

    @classmethod
    def of(cls, batch: VerifyBatch, logits: Tensor, outcome: Outcome) -> _Reports:
        asks = [work.sequence.log_probs or work.sequence.num_top_log_probs > 0 for work in batch.works]
        lines = np.flatnonzero(asks)
        if not len(lines):
            return cls(batch.works, {}, [])
        part = batch.take(lines)
        at = part.real.nonzero()
        chosen = outcome.token_ids[to_device(lines[at[0]], logits.device), to_device(at[1], logits.device)]
        log_probs = torch.log_softmax(logits[to_device(part.rows[at], logits.device)], dim=1)
        num_top = min(max(work.sequence.num_top_log_probs for work in part.works), logits.shape[1])
        top = log_probs.topk(num_top, dim=1)
        first_rows = np.cumsum(part.lens + 1) - (part.lens + 1)
        return cls(
            batch.works,
            dict(zip(lines.tolist(), first_rows.tolist(), strict=True)),
            [log_probs.gather(1, chosen[:, None])[:, 0], top.indices, top.values],
        )

    def read(
        self, columns: list[Floats], line: int, num_tokens: int
    ) -> tuple[tuple[float, ...], tuple[TopLogProbs, ...]]:
        """What the sequence at `line` asked for, of its first `num_tokens` new tokens, from the columns on the host."""
        if line not in self.first_rows:
            return (), ()
        sequence, start = self.works[line].sequence, self.first_rows[line]
        chosen, top_ids, top_values = (column[start : start + num_tokens] for column in columns)
        num_top = min(sequence.num_top_log_probs, top_ids.shape[1])
        tops = tuple(
            TopLogProbs(tuple(ids[:num_top].astype(int).tolist()), tuple(values[:num_top].tolist()))
            for ids, values in zip(top_ids, top_values, strict=True)
        )
        return tuple(chosen.tolist()) if sequence.log_probs else (), tops if num_top else ()
