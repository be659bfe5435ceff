"""Verification and sampling wait for the device once, when their results come over.

Shown on torch's `meta` device: its tensors have shapes and no contents, so whatever looked at contents fails there.
"""

from __future__ import annotations

import pytest
import torch

from services.common.values import Proposal, SamplingParams, SparseRow, VerificationMethod
from services.engine import transfer
from services.engine.sampler import Sampler
from services.engine.step import Work
from services.engine.verifier import Verifier
from tests.unit.engine.sampling_builders import sequence, work

VOCAB_SIZE = 600
PARAMETERS = {
    "greedy": SamplingParams(temperature=0.0),
    "plain": SamplingParams(temperature=1.0, seed=2**63 + 1),
    "truncated": SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05),
    "penalised": SamplingParams(
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1, logit_bias=((7, 2.0),), min_tokens=5
    ),
}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is waited for. `torch.tensor` with a device, which waits for its copy, is not to be had."""
    sizes: list[int] = []
    tensor = torch.tensor

    def fetch(packed: torch.Tensor) -> torch.Tensor:
        sizes.append(packed.numel())
        return torch.zeros(packed.shape, dtype=packed.dtype)

    def on_the_host(*args: object, device: object = None, **kwargs: object) -> torch.Tensor:
        assert device is None
        return tensor(*args, **kwargs)

    monkeypatch.setattr(transfer, "_fetch", fetch)
    monkeypatch.setattr(torch, "tensor", on_the_host)
    return sizes


def logits(works: list[Work]) -> torch.Tensor:
    return torch.empty(sum(item.num_rows for item in works), VOCAB_SIZE, device="meta")


def mixed(method: VerificationMethod) -> list[Work]:
    """A work of every kind of parameters, with proposals of several lengths."""
    rows = (SparseRow((5, 6), (0.5, 0.5)), SparseRow((6,), (1.0,)))
    works = [
        work(sequence([1, 2, 3], params, method, prompt_len=2, eos=frozenset({0}), log_probs=i % 2 == 0))
        for i, params in enumerate(PARAMETERS.values())
    ]
    return [
        Work(item.sequence, 1, Proposal(1, (5, 6)[:n], rows[:n]) if n else None, 1 + n)
        for item, n in zip(works, (2, 0, 2, 1), strict=True)
    ]


@pytest.mark.parametrize("method", list(VerificationMethod))
def test_verification_waits_once(method: VerificationMethod, fetched: list[int]) -> None:
    works = mixed(method)
    Verifier().verify(works, logits(works))
    assert len(fetched) == 1


def test_verification_of_all_methods_together_waits_once(fetched: list[int]) -> None:
    works = [item for method in VerificationMethod for item in mixed(method)]
    Verifier().verify(works, logits(works))
    assert len(fetched) == 1


def test_what_comes_over_does_not_grow_with_the_vocabulary(fetched: list[int]) -> None:
    works = mixed(VerificationMethod.COUPLED)
    Verifier().verify(works, logits(works))
    assert fetched[0] < VOCAB_SIZE / 4


@pytest.mark.parametrize("method", list(VerificationMethod))
def test_sampling_waits_once(method: VerificationMethod, fetched: list[int]) -> None:
    works = [work(sequence([1, 2, 3], params, method)) for params in PARAMETERS.values()]
    Sampler().sample(works, logits(works))
    assert len(fetched) == 1
