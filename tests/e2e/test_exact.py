"""The service's tokens are the target's: the matrix on a tiny model, one configuration on the sample target."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.cluster import prepare_model
from tests.exact.check_exact import PROMPTS, Case, Outcome, check, matrix, read_prompts
from tests.tiny_models import save_model

SHORT_PROMPTS = [
    "Name a colour.",
    "one two three one two three one two",
    "What comes after ababababab?",
    "The quick brown fox jumps over the lazy dog.",
    "x = 1\ny = 2\nx = 1\ny =",
    "Tell me, tell me, tell me",
    "zzzz",
    "A much longer line, so that the prompts of one batch differ in length and the blocks do too.",
]


def assert_exact(outcomes: list[Outcome]) -> None:
    num_outputs = sum(outcome.num_outputs for outcome in outcomes)
    assert [outcome for outcome in outcomes if outcome.num_defects] == []
    assert sum(outcome.num_near_ties for outcome in outcomes) <= 0.01 * num_outputs


@pytest.mark.timeout(300)
def test_greedy_and_coupled_output_is_the_targets_own_for_every_drafter_and_length(tmp_path: Path) -> None:
    model = save_model(tmp_path, seed=3)
    cases = matrix(["ngram", "model"], [1, 4, 8], 8, [0.0, 0.5, 1.0])
    outcomes = check(model, cases, SHORT_PROMPTS, max_tokens=48, num_threads=1)
    assert len(outcomes) == len(cases)
    assert any(outcome.acceptance_rate for outcome in outcomes), "no draft token was ever accepted"
    assert_exact(outcomes)


@pytest.mark.timeout(300)
def test_output_is_the_targets_own_behind_chains_and_stages(tmp_path: Path) -> None:
    model = save_model(tmp_path, seed=3)
    cases = [Case(drafter, 6, 4, t) for drafter in ("suffix,model", "ngram,staged") for t in (0.0, 1.0)]
    outcomes = check(model, cases, SHORT_PROMPTS[:5], max_tokens=32, num_threads=1)
    assert len(outcomes) == len(cases)
    assert_exact(outcomes)


@pytest.mark.sample_model
@pytest.mark.timeout(300)
def test_greedy_output_of_the_sample_target_is_that_of_transformers() -> None:
    model = Path(prepare_model("sample").directory)
    outcomes = check(model, [Case("ngram", 4, 4, 0.0)], read_prompts(PROMPTS, 4), max_tokens=48, num_threads=2)
    assert outcomes[0].num_outputs == 4
    assert_exact(outcomes)
