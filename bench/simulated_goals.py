"""Holds what `make bench-simulated` measured to its goals: speed-up by the formula, CPU time and overhead a round.

    python -m bench.simulated_goals bench/results/simulated.json bench/results/overhead.json \
        bench/results/plain_overhead.json

Owns: the goals. Must not know: how the figures come about but their documents' fields.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from bench.goals import Goal, goal_table, missed, ratio
from services.cli.terminal import notices, results

_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
Document = dict[str, Any]


def goals_of(simulated: Document, overhead: Document, plain: Document) -> tuple[Goal, ...]:
    """Of `outrider bench`, of it with --overhead, and of bench.plain_overhead."""
    alone = next(entry for entry in overhead["sessions"] if entry["num_sessions"] == 1)
    return (
        Goal("speed-up over the formula's, less 1", (simulated["formula"] or {}).get("relative_error"), 0.03, -0.03),
        Goal("CPU time a round, 64 sessions over 1", overhead["cpu_ratio"], 0.6),
        Goal("overhead of a round at 1 session, p50 in ms", alone["coordinator_overhead_ms"]["p50"], 1.5),
        Goal(
            "share of the rounds that had a draft",
            min(ratio(entry["num_drafts"], entry["num_rounds"]) or 0 for entry in overhead["sessions"]),
            least=0.5,
        ),
        Goal("failed requests", simulated["failed_requests"] + overhead["failed_requests"], 0),
        Goal("plain decoding's rate over the engine's", plain["ratio"], least=0.95),
    )


@click.command()
@click.argument("simulated", type=_FILE)
@click.argument("overhead", type=_FILE)
@click.argument("plain", type=_FILE)
def main(simulated: Path, overhead: Path, plain: Path) -> None:
    """Show the goals of the three documents, and exit with 1 where one is missed."""
    goals = goals_of(*(json.loads(file.read_text()) for file in (simulated, overhead, plain)))
    results().print(goal_table("simulated workers", goals))
    if sentences := missed(goals):
        notices().print(sentences, markup=False, highlight=False)
    sys.exit(bool(sentences))


if __name__ == "__main__":
    main()
