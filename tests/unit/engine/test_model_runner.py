"""A step on a CPU runs with the threads that were chosen for it, and leaves the process its own number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from services.common.items import Identity, Open
from services.common.values import SamplingParams, VerificationMethod
from services.engine.model_runner import ModelRunner
from services.engine.models import probe_model
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.thread_choice import ThreadChoice
from tests.tiny_models import build_model


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def runner_of() -> ModelRunner:
    register()
    module = build_model(vocab_size=64)
    module.set_attn_implementation(IMPLEMENTATION)
    module.config.pad_token_id = None
    return ModelRunner(probe_model(module, torch.float32, torch.device("cpu")), 5, 4)


def step_of(num_tokens: int) -> list[Work]:
    tokens = tuple(range(1, 1 + num_tokens))
    identity = Identity("s", 0, 0, 0, num_tokens)
    opened = Open(identity, tokens, num_tokens, frozenset(), SamplingParams(), VerificationMethod.COUPLED, 0)
    sequence = Sequence.from_open(opened)
    sequence.block_table = [3, 1]
    return [Work(sequence, num_tokens, None, 1)]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_step_runs_with_the_chosen_threads(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    runner, seen = runner_of(), []
    monkeypatch.setattr(ThreadChoice, "num_threads", lambda self, num_tokens: num_threads)
    plain = runner.model.module.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        seen.append(torch.get_num_threads())
        return plain(*arguments, **keywords)

    monkeypatch.setattr(runner.model.module, "forward", forward)
    runner.forward(step_of(5))
    assert seen == [num_threads]
    assert torch.get_num_threads() == 2


def test_a_step_that_fails_leaves_the_process_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of()
    monkeypatch.setattr(ThreadChoice, "num_threads", lambda self, num_tokens: 1)
    works = step_of(5)
    works[0].sequence.tokens[2] = 10_000
    with pytest.raises(IndexError):
        runner.forward(works)
    assert torch.get_num_threads() == 2


def test_each_step_is_observed_with_its_tokens_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, observed = runner_of(), []
    monkeypatch.setattr(ThreadChoice, "observe", lambda self, *step: observed.append(step))
    runner.forward(step_of(5))
    runner.forward(step_of(7))
    assert [step[:2] for step in observed] == [(5, 2), (7, 2)]
    assert all(step[2] > 0 for step in observed)


def test_the_number_of_threads_changes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, found = runner_of(), []
    for num_threads in (1, 2):
        monkeypatch.setattr(ThreadChoice, "num_threads", lambda self, num_tokens, n=num_threads: n)
        found.append(runner.forward(step_of(8)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
