"""Losses against their definitions over the whole vocabulary, and the draw of self-play against its distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.engine.training.losses import acceptance, forward_kl, lesson, total_variation
from services.engine.training.self_play import draw

VOCAB_SIZE, HEAD_LEN = 96, 8


def _taught(logits: torch.Tensor, place_of: torch.Tensor) -> tuple[torch.Tensor, object]:
    log_probs = torch.log_softmax(logits, dim=1)
    top = log_probs.topk(HEAD_LEN, dim=1)
    tails = 1 - top.values.exp().sum(dim=1)
    return log_probs.exp(), lesson(top.indices, top.values, tails, place_of)


@pytest.fixture
def target_logits() -> torch.Tensor:
    return 3 * torch.randn(20, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def student_logits() -> torch.Tensor:
    return 2 * torch.randn(20, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))


def test_forward_kl_is_that_of_head_and_rest(target_logits: torch.Tensor, student_logits: torch.Tensor) -> None:
    probs, taught = _taught(target_logits, torch.arange(VOCAB_SIZE))
    student = torch.softmax(student_logits, dim=1)
    for row, found in enumerate(forward_kl(student_logits, taught).tolist()):
        head = probs[row].topk(HEAD_LEN).indices
        p = torch.cat([probs[row][head], 1 - probs[row][head].sum(0, keepdim=True)])
        q = torch.cat([student[row][head], 1 - student[row][head].sum(0, keepdim=True)])
        assert found == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3)


def test_total_variation_bounds_what_rejection_refuses(
    target_logits: torch.Tensor, student_logits: torch.Tensor
) -> None:
    probs, taught = _taught(target_logits, torch.arange(VOCAB_SIZE))
    student = torch.softmax(student_logits, dim=1)
    exact = 1 - torch.minimum(probs, student).sum(dim=1)
    found = total_variation(student_logits, taught)
    assert (found >= exact - 1e-5).all()
    assert (found - exact <= taught.tails + 1e-5).all()


@pytest.mark.parametrize("loss", [forward_kl, total_variation])
def test_descending_a_loss_leads_to_the_target(loss: object, target_logits: torch.Tensor) -> None:
    _, taught = _taught(target_logits, torch.arange(VOCAB_SIZE))
    logits = torch.zeros(20, VOCAB_SIZE, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    before = float(acceptance(logits.detach(), taught).mean())
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward(loss(logits, taught).mean())
        optimizer.step()
    after = float(acceptance(logits.detach(), taught).mean())
    assert before < 0.3
    assert after > float(taught.probs.sum(dim=1).mean()) - 0.01


def test_a_token_that_the_student_lacks_teaches_nothing(target_logits: torch.Tensor) -> None:
    best = target_logits.argmax(dim=1)
    kept = torch.ones(VOCAB_SIZE, dtype=torch.bool).index_fill(0, best, False)
    place_of = torch.where(kept, torch.cumsum(kept, 0) - 1, -1)
    probs, taught = _taught(target_logits, place_of)
    assert (taught.probs[:, 0] == 0).all()
    student = torch.zeros(20, int(kept.sum()))
    assert (acceptance(student, taught) <= 1 - probs.amax(dim=1) + 1e-5).all()
    assert torch.isfinite(forward_kl(student, taught)).all()


class _Talk:
    """What `draw` asks of a conversation."""

    def __init__(self, number: int, temperature: float) -> None:
        self.number, self.temperature, self.seed, self.tokens = number, temperature, 5, [0] * 3


@pytest.mark.parametrize(("temperature", "num_ids"), [(1.0, 96), (0.5, 64)])
def test_tokens_are_drawn_with_their_probabilities(temperature: float, num_ids: int) -> None:
    num = 40_000
    logits = 1.5 * torch.randn(1, 96, generator=torch.Generator().manual_seed(3))
    drawn = draw(logits.expand(num, -1), [_Talk(i, temperature) for i in range(num)])  # type: ignore[misc]
    top = logits[0].topk(num_ids).indices
    expected = torch.zeros(96).index_copy(0, top, torch.softmax(logits[0][top] / temperature, dim=0)).numpy()
    found = np.bincount(drawn.token_ids, minlength=96) / num
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / num)
    assert found[expected == 0].sum() == 0


def test_rows_are_the_targets_at_temperature_one(target_logits: torch.Tensor) -> None:
    drawn = draw(target_logits, [_Talk(i, 0.0) for i in range(20)])  # type: ignore[misc]
    probs = torch.softmax(target_logits, dim=1)
    assert (drawn.token_ids == target_logits.argmax(dim=1).numpy()).all()
    assert np.allclose(drawn.rows.tails, 1 - probs.topk(64, dim=1).values.sum(dim=1).numpy(), atol=1e-5)
    kept = probs.gather(1, torch.from_numpy(drawn.rows.token_ids)).numpy()
    assert np.allclose(np.exp(drawn.rows.log_probs.astype(np.float64)), kept, rtol=2e-2)
