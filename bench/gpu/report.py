"""The figures as a table, a JSON file and a plot.

Owns: how they are shown. Must not know: how they were taken.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from bench.gpu.measure import Rate, StepTime
from services.cli.bench.machine import Environment

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """Of one model."""

    name: str
    weight_bytes: int
    steps: list[StepTime]
    rates: list[Rate]


@dataclass(frozen=True, slots=True)
class Report:
    """Of one run. `skipped`: a sentence for each model that could not be had."""

    environment: Environment
    device: str
    dtype: str
    context: int
    compiled: bool
    copy_gb_per_s: float
    models: list[ModelFigures]
    skipped: list[str]


def write(report: Report, directory: Path) -> None:
    """Writes gpu.json and gpu.png."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "gpu.json").write_text(json.dumps(_rounded(asdict(report)), indent=2) + "\n")
    figure, axes = pyplot.subplots(1, len(report.models), figsize=(6 * len(report.models), 4.5), squeeze=False)
    for axis, model in zip(axes[0], report.models, strict=True):
        for batch in sorted({step.batch for step in model.steps}):
            steps = sorted((step.rows, step.ms) for step in model.steps if step.batch == batch)
            axis.plot(*zip(*steps, strict=True), marker="o", label=f"{batch}")
        axis.axhline(model.weight_bytes / report.copy_gb_per_s / 1e6, color="grey", linestyle="--")
        axis.set(title=model.name, xlabel="rows a sequence", ylabel="ms a step", xscale="log", yscale="log")
        axis.legend(title="sequences", fontsize="small")
    figure.suptitle(f"{report.device}, {report.dtype}; dashed: reading the weights once")
    figure.tight_layout()
    figure.savefig(directory / "gpu.png", dpi=120)
    pyplot.close(figure)


def show(report: Report, console: Console) -> None:
    """Prints one table of steps and one of rates for each model."""
    console.print(f"{report.device}, {report.dtype}, context {report.context}; copies {report.copy_gb_per_s:.0f} GB/s")
    for model in report.models:
        rows = sorted({step.rows for step in model.steps})
        table = Table(title=f"{model.name}: ms a step (share of the memory's limit)")
        for column in ("sequences", *(f"{n} rows" if n > 1 else "1 row" for n in rows)):
            table.add_column(column, justify="right")
        for batch in sorted({step.batch for step in model.steps}):
            cells = {s.rows: f"{s.ms:.2f} ({s.share:.2f})" for s in model.steps if s.batch == batch}
            table.add_row(str(batch), *(cells.get(n, "") for n in rows))
        console.print(table)
        if model.rates:
            table = Table("engine", "sequences", "draft tokens", "acceptance", "tokens/s", title=f"{model.name}: rates")
            for rate in model.rates:
                acceptance = "" if rate.acceptance is None else f"{rate.acceptance:.1f}"
                cells = (rate.engine, rate.batch, rate.num_draft_tokens, acceptance, f"{rate.tokens_per_s:.1f}")
                table.add_row(*map(str, cells))
            console.print(table)
    for sentence in report.skipped:
        console.print(f"skipped: {sentence}")


def _rounded(value: object) -> object:
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list():
            return [_rounded(item) for item in value]
    return value
