"""The rates between two looks, and how they are drawn."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from services.cli.top.rates import ClusterView, Look, view_of
from services.cli.top.view import render, sparkline
from services.client import ClusterStatus, CoordinatorActivity, DraftPool, WorkerStatus
from services.common.values import ModelInfo, WorkerActivity, WorkerInfo, WorkerLoad

MODEL = ModelInfo("llama", "d", "v", 100, "float32", "cpu")
INFO = WorkerInfo("w1", "target", MODEL, "", 16, 256, 4096, load=WorkerLoad(3, 2, 40, 50))
TARGET = WorkerStatus("target", "10.0.0.1:50053", "", True, "", INFO)
POOL = DraftPool("ngram", 1.0, "ngram", "", True, 10, 40, 20)
STATUS = ClusterStatus("c1", 5.0, False, 3, 1, CoordinatorActivity(), (TARGET,), (POOL,))


def at(seconds: float, **answers: ClusterStatus | str) -> Look:
    return Look(seconds, answers)


def test_a_first_look_has_no_rates() -> None:
    view = view_of(at(10.0, a=STATUS), None)
    assert view.interval_s is view.tokens_per_s is view.workers[0].busy is None
    assert (view.coordinators[0].num_running, view.workers[0].num_used_blocks) == (3, 40)
    assert view.pools[0].total_acceptance_rate == 0.5


def test_rates_are_those_of_the_time_between() -> None:
    done = CoordinatorActivity(
        num_calls=4,
        num_generated_tokens=300,
        num_rounds=90,
        num_plain_rounds=10,
        num_drafts=90,
        num_draft_tokens=360,
        num_accepted_tokens=180,
        cpu_ns=50_000_000,
    )
    worked = WorkerActivity(
        num_steps=50,
        num_step_sequences=200,
        num_step_rows=800,
        num_tokens=300,
        busy_ns=1_000_000_000,
        num_answers=100,
        queue_ns=200_000_000,
    )
    later = replace(
        STATUS,
        activity=done,
        workers=(replace(TARGET, info=replace(INFO, activity=worked)),),
        drafts=(replace(POOL, num_drafts=100, num_draft_tokens=400, num_accepted_tokens=200),),
    )
    view = view_of(at(12.0, a=later), at(10.0, a=STATUS))
    [coordinator], [worker], [pool] = view.coordinators, view.workers, view.pools
    assert (view.tokens_per_s, coordinator.rounds_per_s, coordinator.calls_per_s) == (150, 50, 2)
    assert (coordinator.acceptance_rate, coordinator.mean_acceptance_len, coordinator.cpu_ms_per_round) == (0.5, 3, 0.5)
    assert (worker.batch, worker.rows, worker.step_ms, worker.queue_ms) == (4, 16, 20, 2)
    assert (worker.busy, worker.tokens_per_s) == (0.5, 150)
    assert (pool.acceptance_rate, pool.mean_acceptance_len, pool.draft_tokens_per_s) == (0.5, 3, 180)


@pytest.mark.parametrize("before", ["cannot reach it", replace(STATUS, instance_id="c0")])
def test_a_coordinator_that_was_away_or_started_anew_has_no_rates(before: ClusterStatus | str) -> None:
    many = replace(STATUS, activity=CoordinatorActivity(num_generated_tokens=10**6))
    view = view_of(at(11.0, a=many), at(10.0, a=before))
    assert view.tokens_per_s is view.coordinators[0].tokens_per_s is view.pools[0].draft_tokens_per_s is None


def test_a_worker_that_was_started_anew_has_no_rates() -> None:
    anew = replace(STATUS, workers=(replace(TARGET, info=replace(INFO, instance_id="w2")),))
    assert view_of(at(11.0, a=anew), at(10.0, a=STATUS)).workers[0].tokens_per_s is None


def test_a_worker_known_to_several_coordinators_is_shown_once_and_by_the_one_that_reaches_it() -> None:
    lost = replace(TARGET, up=False, trouble="connection refused", info=None)
    view = view_of(at(10.0, a=replace(STATUS, workers=(lost,)), b=STATUS, c="gone"), None)
    assert [(row.state, row.num_sequences) for row in view.workers] == [("up", 3)]
    assert [row.trouble for row in view.coordinators] == ["", "", "gone"]


def test_pools_of_several_coordinators_are_summed_by_name() -> None:
    other = replace(STATUS, instance_id="c2", drafts=(replace(POOL, num_accepted_tokens=40, ready=False),))
    [pool] = view_of(at(10.0, a=STATUS, b=other), None).pools
    assert (pool.total_acceptance_rate, pool.ready) == (0.75, True)


def test_a_pool_that_drafts_for_several_models_is_one() -> None:
    other = replace(POOL, num_draft_tokens=100, num_accepted_tokens=90)
    before = replace(STATUS, drafts=(POOL, other))
    now = replace(STATUS, drafts=(replace(POOL, num_draft_tokens=60, num_accepted_tokens=30), other))
    [pool] = view_of(at(12.0, a=now), at(10.0, a=before)).pools
    assert (pool.acceptance_rate, pool.draft_tokens_per_s, pool.total_acceptance_rate) == (0.5, 10, 0.75)


@pytest.mark.parametrize("width", [60, 100, 180])
def test_what_is_drawn_fits_the_terminal_and_cannot_steer_it(width: int) -> None:
    evil = replace(TARGET, up=False, trouble="\x1b[2Jgone", address="a" * 40 + ":50053")
    view = view_of(at(10.0, a=replace(STATUS, workers=(TARGET, evil))), None)
    text = drawn(view, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "gone" in text
    assert "80 %" in text or width < 100


def drawn(view: ClusterView, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render(view, [1.0, 4.0], width))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_sparkline_has_a_bar_a_value() -> None:
    assert sparkline([0.0, 4.0, 8.0]) == " ▄█"
    assert sparkline([0.0, 0.0]) == "  "
    assert sparkline([]) == ""
