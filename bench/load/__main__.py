"""The service under load, with real processes, simulated workers and the client library.

    python -m bench.load --json bench/results/load.json
    python -m bench.load --parts overload,slow-clients

Parts that are in the file already and are not measured now are kept.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click

from bench.goals import Goal, goal_table
from bench.load import delay, overload, sessions, slow_clients
from bench.load.report import tables_of
from services.cli.bench.machine import environment
from services.cli.terminal import notices, progress_bar, results


class Figures(Protocol):
    """What a part measured: a dataclass."""

    @property
    def goals(self) -> tuple[Goal, ...]: ...


class Part(NamedTuple):
    """`measure` calls its argument `num_runs` times."""

    num_runs: int
    measure: Callable[[Callable[[], None]], Figures]


def parts() -> dict[str, Part]:
    """Of the whole measurement, in order."""
    over, slow, many, late = (
        overload.OverloadPlan(),
        slow_clients.SlowPlan(),
        sessions.SessionsPlan(),
        delay.DelayPlan(),
    )
    return {
        "overload": Part(2 * over.num_repeats, lambda on_run: overload.measure(over, on_run)),
        "slow-clients": Part(2 * slow.num_repeats, lambda on_run: slow_clients.measure(slow, on_run)),
        "sessions": Part(2 * many.num_repeats, lambda on_run: sessions.measure(many, on_run)),
        "delay": Part(late.num_runs, lambda on_run: delay.measure(late, on_run)),
    }


@click.command()
@click.option("--parts", "chosen", default=",".join(parts()), show_default=True, help="What to measure.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(chosen: str, json_file: Path | None) -> None:
    """Measure the service under load; exit with 1 where a goal is missed."""
    known = parts()
    names = chosen.split(",")
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint="--parts")
    figures: dict[str, Figures] = {}
    with progress_bar(notices()) as progress:
        task = progress.add_task("measuring", total=sum(known[name].num_runs for name in names))
        for name in names:
            progress.update(task, description=name)
            figures[name] = known[name].measure(lambda: progress.advance(task))
            gc.collect()  # grpc.aio stays with the event loop of its last channel as long as that is referred to
    for name, measured in figures.items():
        for table in (*tables_of(measured), goal_table(name, measured.goals)):
            results().print(table)
    if json_file is not None:
        _write(json_file, {name: _as_object(measured) for name, measured in figures.items()})
    sys.exit(any(not goal.met for measured in figures.values() for goal in measured.goals))


def _as_object(measured: Any) -> dict[str, Any]:
    taken = dataclasses.asdict(environment([])) | {"command": "python -m bench.load --json bench/results/load.json"}
    goals = [dataclasses.asdict(goal) | {"met": goal.met} for goal in measured.goals]
    return {"goals": goals, "figures": dataclasses.asdict(measured), "environment": taken}


def _write(file: Path, measured: dict[str, Any]) -> None:
    earlier = json.loads(file.read_text()) if file.exists() else {}
    both = earlier | measured
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({name: both[name] for name in parts() if name in both}, indent=1) + "\n")


if __name__ == "__main__":
    main()
