"""Goals of measurements: whether they are met, and what is told where one is missed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench.goals import Goal, missed
from bench.simulated_goals import main

SIMULATED: dict[str, Any] = {"formula": {"relative_error": -0.03}, "failed_requests": 0}
OVERHEAD: dict[str, Any] = {
    "sessions": [
        {"num_sessions": 1, "num_rounds": 40, "num_drafts": 20, "coordinator_overhead_ms": {"p50": 1.5}},
        {"num_sessions": 64, "num_rounds": 50, "num_drafts": 40, "coordinator_overhead_ms": {"p50": 20.0}},
    ],
    "cpu_ratio": 0.6,
    "failed_requests": 0,
}
PLAIN: dict[str, Any] = {"ratio": 0.95}


def judge(directory: Path, documents: tuple[dict[str, Any], ...]) -> tuple[int, str]:
    """The command's status and what it says of misses."""
    files = [directory / f"{number}.json" for number in range(len(documents))]
    for file, document in zip(files, documents, strict=True):
        file.write_text(json.dumps(document))
    done = CliRunner().invoke(main, [str(file) for file in files])
    return done.exit_code, done.stderr


def test_figures_at_their_goals_pass(tmp_path: Path) -> None:
    assert judge(tmp_path, (SIMULATED, OVERHEAD, PLAIN)) == (0, "")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ((0, "formula", "relative_error"), -0.031, "formula"),
        ((0, "formula", "relative_error"), 0.031, "formula"),
        ((0, "formula"), None, "formula"),
        ((0, "failed_requests"), 1, "failed"),
        ((1, "cpu_ratio"), 0.61, "CPU time"),
        ((1, "sessions", 0, "coordinator_overhead_ms", "p50"), 1.51, "overhead"),
        ((1, "sessions", 0, "coordinator_overhead_ms", "p50"), None, "overhead"),
        ((1, "sessions", 1, "num_drafts"), 24, "draft"),
        ((1, "failed_requests"), 1, "failed"),
        ((2, "ratio"), 0.949, "plain"),
    ],
)
def test_a_missed_goal_ends_with_a_sentence_and_status_1(
    tmp_path: Path, path: tuple[Any, ...], value: Any, named: str
) -> None:
    documents = copy.deepcopy((SIMULATED, OVERHEAD, PLAIN))
    place: Any = documents
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    status, sentences = judge(tmp_path, documents)
    assert status == 1
    assert named in sentences
    assert sentences.count("wanted was") == 1


def test_a_sentence_has_the_figure_and_what_was_wanted() -> None:
    goals = (Goal("x", 2.0, most=1.5), Goal("y", None, least=1.0), Goal("z", 1.0, least=1.0, most=1.0))
    assert missed(goals) == "x is 2; wanted was at most 1.5.\ny is not measured; wanted was at least 1."
