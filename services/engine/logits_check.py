"""What sampling and verification refuse to work on: logits that are not finite, or too few.

Owns: these checks and their sentences. Must not know: what logits are for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.common.errors import Internal
from services.engine.step import Work


def check_num_rows(works: list[Work], logits: Tensor) -> None:
    """Raises Internal where the model gave another number of rows than the works ask for."""
    if len(logits) != (expected := sum(work.num_rows for work in works)):
        raise Internal("DEFECT", f"the model gave {len(logits)} rows of logits, {expected} were asked for")


def nonfinite_rows(logits: Tensor) -> Tensor:
    """Which rows [R, V] hold a NaN or an infinity: bool [R], without a transfer off a device.

    On a host, where sorting takes numbers only, the rows are to be filled with some before the logits are used.
    """
    if logits.is_cpu:  # where the one pass is not vectorised: it takes 16 times as long as these two
        lowest, highest = logits.amin(dim=1), logits.amax(dim=1)
    else:
        lowest, highest = torch.aminmax(logits, dim=1)
    return ~(torch.isfinite(lowest) & torch.isfinite(highest))


def nonfinite_errors(works: list[Work], nonfinite: npt.NDArray[np.generic]) -> dict[int, Internal]:
    """By the index of each work with a row flagged in `nonfinite` [sum of num_rows]: an error naming its session."""
    if not nonfinite.any():
        return {}
    owners = np.repeat(np.arange(len(works)), [work.num_rows for work in works])
    return {int(index): _error(works[index]) for index in np.unique(owners[nonfinite.astype(bool)])}


def _error(work: Work) -> Internal:
    sequence = work.sequence
    where = f"session {sequence.identity.session_id}, behind {len(sequence.tokens)} tokens"
    return Internal("DEFECT", f"the model's logits are not finite: {where}")
