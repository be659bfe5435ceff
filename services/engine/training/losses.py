"""What a student is taught: the target's distribution, of which the head is known token by token and the rest as one.

Owns: the two losses. Must not know: models, batches. For a position let P be the target's probabilities of its most
likely tokens, of which the student can propose those in R, t the mass of all tokens beyond, Q the student's.

    forward KL         sum over R of P log(P / Q), plus t log(t / rest of Q)           (up to a constant)
    total variation    1 - sum over R of min(P, Q): what rejection does not accept  (Leviathan et al. 2023, section 3)

What the target gives to tokens that the student does not have is beyond teaching, and left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LEAST = 1e-6


class Lesson(NamedTuple):
    """Rows of a batch, on the student's vocabulary of R tokens."""

    places: Tensor
    """int64 [P, L]: where in the student's logits each token stands; 0 where it is lacking."""
    probs: Tensor
    """float32 [P, L]; 0 where it is lacking."""
    tails: Tensor
    """float32 [P]"""


def lesson(row_ids: Tensor, row_log_probs: Tensor, tails: Tensor, place_of: Tensor) -> Lesson:
    """`place_of` [V] gives each token's place in the student's vocabulary, or -1."""
    places = place_of[row_ids]
    probs = torch.where(places >= 0, row_log_probs.exp(), 0.0)
    return Lesson(places.clamp(min=0), probs, tails)


def forward_kl(logits: Tensor, lesson: Lesson) -> Tensor:
    """Cross-entropy [P] of student's float32 logits [P, R], less the target's own entropy over the same parts."""
    log_probs = _log_probs(logits, lesson)
    within = torch.where(lesson.probs > 0, log_probs.exp(), 0.0).sum(dim=1)
    rest = (1.0 - within).clamp(min=_LEAST).log()
    cross = -(lesson.probs * log_probs).sum(dim=1) - lesson.tails * rest
    own = torch.special.xlogy(lesson.probs, lesson.probs).sum(dim=1) + torch.special.xlogy(lesson.tails, lesson.tails)
    loss: Tensor = cross + own
    return loss


def total_variation(logits: Tensor, lesson: Lesson) -> Tensor:
    """[P], from student's float32 logits [P, R]; mass beyond the head counts as not accepted."""
    return 1.0 - acceptance(logits, lesson)


def acceptance(logits: Tensor, lesson: Lesson) -> Tensor:
    """How much of the student's draws rejection accepts, at temperature 1: [P]."""
    return torch.minimum(lesson.probs, _log_probs(logits, lesson).exp()).sum(dim=1)


def _log_probs(logits: Tensor, lesson: Lesson) -> Tensor:
    return logits.gather(1, lesson.places) - torch.logsumexp(logits, dim=1, keepdim=True)


LOSSES = {"kl": forward_kl, "tv": total_variation}
