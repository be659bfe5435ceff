"""The measurements under load at a small size: what happens, never how fast."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from bench.load import __main__ as command
from bench.load import delay, overload, sessions, slow_clients


def test_beyond_its_places_a_coordinator_refuses_at_once_with_a_time_to_retry():
    plan = overload.OverloadPlan(num_places=3, num_tokens=48, phase_s=1.0, num_repeats=1, step_ms=10.0, token_ms=1.0)
    figures = overload.measure(plan)
    for phase in (figures.at_capacity, figures.overload):
        assert phase.num_finished > 0
        assert not phase.other_errors
        assert phase.num_refused_without_delay == 0
        assert phase.max_running <= plan.num_places
        assert phase.max_target_queue <= 2 * plan.num_places  # one that has ended may still be closing
    assert figures.overload.num_refused > 0
    assert figures.overload.num_finished + figures.overload.num_refused == figures.overload.num_requests


def test_clients_that_do_not_read_are_ended_and_the_others_go_on():
    plan = slow_clients.SlowPlan(
        num_slow=20,
        num_others=4,
        num_tokens=24,
        num_repeats=1,
        slow_client_s=1.0,
        max_unread_tokens=8,
        step_ms=5.0,
        token_ms=0.5,
    )
    figures = slow_clients.measure(plan)
    assert figures.slow_ends == {"SLOW_CLIENT": 20}
    assert not figures.other_errors
    assert min(figures.num_requests) >= plan.num_others
    assert figures.most_tokens_of_slow < 2000  # of the 30,000 that they asked for


def test_many_sessions_run_on_one_coordinator_and_on_two():
    plan = sessions.SessionsPlan(num_sessions=60, num_seconds=1.0, num_repeats=1, step_ms=50.0, token_ms=2.0)
    figures = sessions.measure(plan)
    assert [run.num_coordinators for run in figures.runs] == [1, 2]
    for run in figures.runs:
        assert (run.num_failed, run.num_stalled) == (0, 0)
        assert run.num_rounds >= plan.num_sessions
        assert run.cpu_ms_per_round
        assert plan.num_sessions / run.num_coordinators < run.max_fds < figures.max_fds_allowed


def test_generations_behind_delaying_proxies_are_compared_with_the_plan():
    plan = delay.DelayPlan(sizes=(2,), lengths=(4,), num_tokens=48, num_repeats=1, step_ms=5.0, token_ms=0.5)
    figures = delay.measure(plan)
    (cell,) = figures.cells
    assert cell.planned_per_s < cell.undelayed_planned_per_s
    assert cell.tokens_per_s < cell.undelayed_per_s
    assert set(figures.round_trip_ms) == {"target", "draft"}
    assert all(after >= before + 2 * plan.delay_ms - 1 for before, after in figures.round_trip_ms.values())


def test_the_command_keeps_earlier_parts_and_tells_of_missed_goals(tmp_path, monkeypatch: pytest.MonkeyPatch):
    run = sessions.Run(1, 0, None, 0.0, 1, 0, {"NO_TARGET": 1}, sessions.Percentiles(None, None), 0)
    measured = sessions.SessionsFigures(1, 1, 1024, (run,))
    monkeypatch.setattr(sessions, "measure", lambda plan, on_run: measured)
    file = tmp_path / "load.json"
    file.write_text(json.dumps({"overload": {"goals": []}}))
    done = CliRunner().invoke(command.main, ["--parts", "sessions", "--json", str(file)])
    assert done.exit_code == 1, done.output
    written = json.loads(file.read_text())
    assert list(written) == ["overload", "sessions"]
    assert [goal["met"] for goal in written["sessions"]["goals"]] == [False, True, False, False]
    assert CliRunner().invoke(command.main, ["--parts", "nonsense"]).exit_code == 2
