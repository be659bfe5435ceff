"""The adaptive draft length against every fixed one, with real processes and simulated workers.

    python -m bench.draft_length --drafters good,poor,useless --sizes 1,4,16,64

Writes draft_length.json and draft_length.png. Cells that are in the file already and are not measured now are kept.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click
import matplotlib
from rich.table import Table

from bench.draft_length.measure import DRAFTERS, LENGTHS, ROW_MS, STEP_MS, Cell, Run, measure
from services.cli.bench.machine import environment
from services.cli.terminal import notices, progress_bar, results

matplotlib.use("Agg")
from matplotlib import pyplot

MIN_OVER_PLAIN, MIN_OVER_BEST = 0.97, 0.95


@click.command()
@click.option("--drafters", default=",".join(DRAFTERS), show_default=True, help="Which of good, poor, useless.")
@click.option("--sizes", default="1,4,16,64", show_default=True, help="Numbers of generations at once.")
@click.option("--lengths", default=",".join(map(str, LENGTHS)), show_default=True, help="Fixed draft lengths.")
@click.option("--num-tokens", type=click.IntRange(min=64), default=160, show_default=True, help="Of each generation.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("bench/results"), show_default=True
)
def main(drafters: str, sizes: str, lengths: str, num_tokens: int, out: Path) -> None:
    """Compare the adaptive draft length with fixed ones; exit with 1 where it misses a goal."""
    names, counts = drafters.split(","), tuple(int(size) for size in sizes.split(","))
    fixed = tuple(int(length) for length in lengths.split(","))
    cells: list[Cell] = []
    with progress_bar(notices()) as progress:
        task = progress.add_task("measuring", total=len(names) * len(counts) * (len(fixed) + 1))
        for name in names:
            cells += measure(name, counts, num_tokens, fixed, on_run=lambda: progress.advance(task))
    cells = _with_earlier(cells, out / "draft_length.json")
    _print(cells)
    out.mkdir(parents=True, exist_ok=True)
    (out / "draft_length.json").write_text(json.dumps(_as_object(cells, num_tokens), indent=1) + "\n")
    _plot(cells, out / "draft_length.png")
    sys.exit(any(cell.over_plain < MIN_OVER_PLAIN or cell.over_best < MIN_OVER_BEST for cell in cells))


def _with_earlier(cells: list[Cell], file: Path) -> list[Cell]:
    measured = {(cell.drafter, cell.num_sequences): cell for cell in cells}
    earlier = json.loads(file.read_text())["cells"] if file.exists() else []
    for fields in earlier:
        key = fields["drafter"], fields["num_sequences"]
        measured.setdefault(key, Cell(*key, tuple(Run(**run) for run in fields["runs"])))
    order = list(DRAFTERS)
    return sorted(measured.values(), key=lambda cell: (order.index(cell.drafter), cell.num_sequences))


def _as_object(cells: list[Cell], num_tokens: int) -> dict[str, Any]:
    taken = dataclasses.asdict(environment([])) | {"command": "python -m bench.draft_length"}
    return {
        "step_ms": STEP_MS,
        "row_ms": ROW_MS,
        "drafters": {name: {"acceptance": a, "token_ms": ms} for name, (a, ms) in DRAFTERS.items()},
        "num_tokens": num_tokens,
        "least_over_plain": round(min(cell.over_plain for cell in cells), 4),
        "least_over_best": round(min(cell.over_best for cell in cells), 4),
        "plan_error": {
            "median": round(_errors(cells)[len(_errors(cells)) // 2], 4),
            "most": round(_errors(cells)[-1], 4),
        },
        "cells": [
            {
                "drafter": cell.drafter,
                "num_sequences": cell.num_sequences,
                "over_plain": round(cell.over_plain, 4),
                "over_best": round(cell.over_best, 4),
                "best_num_draft_tokens": cell.best.num_draft_tokens,
                "runs": [dataclasses.asdict(run) for run in cell.runs],
            }
            for cell in cells
        ],
        "environment": taken,
    }


def _errors(cells: list[Cell]) -> list[float]:
    """Of what was planned, against what was measured; from the least."""
    runs = [run for cell in cells for run in cell.runs]
    return sorted(abs(run.planned_per_s / run.tokens_per_s - 1) for run in runs if run.planned_per_s)


def _print(cells: list[Cell]) -> None:
    table = Table("drafter", "at once", "plain", "best K", "adaptive", "over plain", "over best", "drafted", "plan")
    for cell in cells:
        adaptive = next(run for run in cell.runs if run.num_draft_tokens is None)
        table.add_row(
            cell.drafter,
            str(cell.num_sequences),
            f"{cell.rate(0):.1f}",
            f"{cell.best.tokens_per_s:.1f} (K={cell.best.num_draft_tokens})",
            f"{adaptive.tokens_per_s:.1f}",
            f"{cell.over_plain:.3f}",
            f"{cell.over_best:.3f}",
            f"{adaptive.mean_draft_len:.2f}",
            f"{_errors([cell])[-1]:.1%}",
        )
    table.caption = "tokens/s; drafted: a round's; plan: the farthest that `outrider plan` is off at any K"
    results().print(table)


def _plot(cells: list[Cell], file: Path) -> None:
    names = [name for name in DRAFTERS if any(cell.drafter == name for cell in cells)]
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 4), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for number, cell in enumerate(cell for cell in cells if cell.drafter == name):
            fixed = [run for run in cell.runs if run.num_draft_tokens is not None]
            x = [run.num_draft_tokens for run in fixed]
            panel.plot(x, [run.tokens_per_s / cell.rate(0) for run in fixed], "o-", ms=3, color=f"C{number}")
            panel.axhline(cell.over_plain, ls="--", lw=1, color=f"C{number}", label=f"{cell.num_sequences} at once")
        panel.set(title=f"{name} drafter", xlabel="draft tokens a round", ylabel="rate over plain decoding")
        panel.legend(title="dashed: adaptive")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
