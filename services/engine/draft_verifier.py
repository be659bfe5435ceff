"""Verification between two drafts: the larger one verifies what the smaller drafted, and proposes the outcome.

Owns: that the outcome comes with the rows it is distributed by. Must not know: models, drafters, the wire, the target.

    greedy, coupled     as the target verifies, under the noise that the target uses                        no rows
    rejection           against the larger draft's MAX_DRAFT_ROW_LEN most likely tokens, renormalised       those rows
    threshold           the same rows; the target looks at the tokens alone                                 no rows

Rejection yields tokens with exactly the distribution that was verified against (Leviathan et al. 2023, appendix A.1),
so each token was drawn from its row, as the target's verification asks, although the smaller draft chose it. The noise
that decides is that of the accept, residual and target purposes under the sequence's seed. On a draft that verifies by
rejection this is a derived seed: independent of the target's noise, and by its purposes of the smaller draft's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.common.errors import OutriderError
from services.common.values import MAX_DRAFT_ROW_LEN, SparseRow, VerificationMethod
from services.engine import acceptance
from services.engine.choosing import choose
from services.engine.logits_check import check_num_rows, nonfinite_errors, nonfinite_rows
from services.engine.processing import process, rows_of
from services.engine.step import Verdict, Work
from services.engine.transfer import to_device, to_host
from services.engine.verify_batch import VerifyBatch


class DraftVerifier:
    """Verifies a smaller draft's proposals on a draft (services.engine.paged_model.LogitsVerifier)."""

    def verify(self, works: list[Work], logits: Tensor) -> list[Verdict | OutriderError | None]:
        """One verdict for each work with rows, from float32 logits [sum of num_rows, V] in the order of the works.

        In the place of a verdict stands an error where a work's logits are not finite. Raises Internal for a wrong
        number of rows.
        """
        asking = [work for work in works if work.num_rows]
        check_num_rows(asking, logits)
        if not asking:
            return [None] * len(works)
        nonfinite = nonfinite_rows(logits)
        if logits.device.type == "cpu" and nonfinite.any():  # sorting on a host takes numbers only
            logits = logits.masked_fill(nonfinite[:, None], 0.0)
        batch = VerifyBatch.of(asking, logits.shape[1])
        scores, row_ids, row_probs = _truncate(process(logits, rows_of(asking)), batch)
        outcome, _ = choose(batch, scores, untrusted_drafts=False)
        flags, num_accepted, token_ids, ids, probs = to_host(
            [nonfinite, outcome.num_accepted, outcome.token_ids, row_ids, row_probs]
        )
        errors = nonfinite_errors(asking, flags)

        verdicts: list[Verdict | OutriderError] = []
        rows = iter(zip(ids.astype(np.int64), probs, strict=True))
        for line, (work, method) in enumerate(zip(asking, batch.methods, strict=True)):
            num, sequence = int(num_accepted[line]), work.sequence
            chosen = tuple(token_ids[line, : num + 1].astype(int).tolist())
            kept, num = acceptance.end(chosen, num, sequence.eos_token_ids, sequence.num_remaining_tokens)
            own = [_row(*next(rows)) for _ in range(work.num_rows)] if _is_drawn(method) else []
            sent = tuple(own[: len(kept)]) if method is VerificationMethod.REJECTION else ()
            verdicts.append(errors[line] if line in errors else Verdict(kept, num, rows=sent))
        answers = iter(verdicts)
        return [next(answers) if work.num_rows else None for work in works]


def _is_drawn(method: VerificationMethod | None) -> bool:
    return method in (VerificationMethod.REJECTION, VerificationMethod.THRESHOLD)


def _truncate(scores: Tensor, batch: VerifyBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Scores whose drawn rows are those to be sent; of these, in order, ids and probabilities [number of those, L]."""
    num_rows = [work.num_rows for work in batch.works]
    drawn = np.flatnonzero(np.repeat([_is_drawn(method) for method in batch.methods], num_rows))
    at = to_device(drawn, scores.device)
    top = scores[at].topk(min(MAX_DRAFT_ROW_LEN, scores.shape[1]), dim=1)
    probs = torch.softmax(top.values, dim=1)
    if not len(drawn):
        return scores, top.indices, probs
    truncated = torch.full_like(scores[at], -torch.inf).scatter(1, top.indices, torch.log_softmax(top.values, dim=1))
    return scores.index_copy(0, at, truncated), top.indices, probs


def _row(token_ids: npt.NDArray[np.int64], probs: npt.NDArray[np.float64]) -> SparseRow:
    return SparseRow(tuple(token_ids[probs > 0].tolist()), tuple(probs[probs > 0].tolist()))
