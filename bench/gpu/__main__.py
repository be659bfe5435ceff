"""Measures the engine on one GPU: steps by batch and rows, rates plain and speculative, transformers beside it.

    python -m bench.gpu                        a Llama-8B and a 1B shape with random weights, and the sample model
    python -m bench.gpu --tiny --device cpu    the same in seconds, of models too small to mean anything

Acceptance is synthetic: random models agree on nothing, so how many draft tokens stand is drawn with the rate given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.gpu import measure, report
from bench.gpu.measure import Rate
from bench.gpu.models import GIB, BenchModel, build
from services.cli.bench.machine import environment
from services.common.errors import ConfigError, ModelUnsupported
from services.engine.models import torch_device, torch_dtype


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. The first model is the target of the second; those behind them are measured by themselves."""

    models: tuple[str, ...] = ("llama-8b", "llama-1b", "sample")
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    rows: tuple[int, ...] = (1, 2, 4, 5, 8, 16)
    rate_batches: tuple[int, ...] = (1, 16, 64)
    num_draft_tokens: int = 4
    acceptances: tuple[float, ...] = (0.6, 0.8, 0.9)
    context: int = 512
    max_graph_tokens: int = 512
    step_budget_s: float = 0.25
    rate_s: float = 2.0
    num_generated: int = 64
    copy_bytes: int = 2 * GIB

    @property
    def num_steps(self) -> int:
        """Figures to take if every model can be had."""
        rates = len(self.rate_batches) * len(self.acceptances) + 2
        return len(self.models) * len(self.batches) * len(self.rows) + rates


TINY = Plan(
    models=("tiny-target", "tiny-draft"),
    batches=(1, 2),
    rows=(1, 3),
    rate_batches=(1,),
    num_draft_tokens=2,
    acceptances=(0.8,),
    context=20,
    max_graph_tokens=16,
    step_budget_s=0.0,
    rate_s=0.0,
    num_generated=4,
    copy_bytes=1 << 20,
)


@click.command()
@click.option("--device", default="cuda", show_default=True, help="Device.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Floating point type.")
@click.option("--tiny", is_flag=True, help="Two tiny models and few figures: shows that the benchmark runs.")
@click.option("--models", default="", help="Names instead of the default ones, with commas between.")
@click.option("--context", type=click.IntRange(min=16), help="Tokens of a sequence.")
@click.option("--no-graphs", is_flag=True, help="Launch every kernel from the host.")
@click.option("--compile", "compiled", is_flag=True, help="Compile norms and MLPs.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True)
def main(
    device: str, dtype: str, tiny: bool, models: str, context: int | None, no_graphs: bool, compiled: bool, output: Path
) -> None:
    """Measure the engine on one GPU and write gpu.json and gpu.png."""
    plan = TINY if tiny else Plan()
    plan = replace(
        plan,
        models=tuple(models.split(",")) if models else plan.models,
        context=context or plan.context,
        max_graph_tokens=0 if no_graphs else plan.max_graph_tokens,
    )
    try:
        found = run(plan, torch_device(device), dtype, compiled)
    except (ConfigError, ModelUnsupported) as error:
        raise click.ClickException(str(error)) from None
    report.show(found, Console())
    report.write(found, output)


def run(plan: Plan, device: torch.device, dtype: str, compiled: bool) -> report.Report:
    """Takes all figures, model after model; the first two stay loaded together."""
    bandwidth = measure.copy_bandwidth(device, plan.copy_bytes)
    pair: list[BenchModel] = []
    figures: list[report.ModelFigures] = []
    skipped: list[str] = []
    num_blocks = measure.num_blocks_for(max(plan.batches), plan.context, 2 * max(plan.rows))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=plan.num_steps)
        for index, name in enumerate(plan.models):
            progress.update(task, description=name)
            try:
                bench = build(name, torch_dtype(dtype), device, num_blocks, plan.max_graph_tokens, compiled)
            except (ConfigError, ModelUnsupported) as error:
                skipped.append(f"{name}: {error}")
                progress.advance(task, len(plan.batches) * len(plan.rows))
                continue
            steps = []
            for batch in plan.batches:
                for rows in plan.rows:
                    steps.append(measure.step_time(bench, batch, rows, plan.context, bandwidth, plan.step_budget_s))
                    progress.advance(task)
            plain = [Rate("outrider", s.batch, 0, None, s.batch / s.ms * 1e3) for s in steps if s.rows == 1]
            figures.append(report.ModelFigures(name, bench.weight_bytes, steps, plain))
            if index < 2:
                pair.append(bench)
        if len(pair) == 2:
            figures[0].rates.extend(_pair_rates(plan, *pair, lambda: progress.advance(task)))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    where = environment(sys.argv[1:])
    where = replace(where, command=where.command.replace("outrider", "python -m bench.gpu", 1))
    return report.Report(where, name, dtype, plan.context, compiled, bandwidth / 1e9, figures, skipped)


def _pair_rates(plan: Plan, target: BenchModel, draft: BenchModel, advance: Callable[[], None]) -> list[Rate]:
    rates = []
    for batch in plan.rate_batches:
        for acceptance in plan.acceptances:
            rates.append(
                measure.speculative_rate(
                    target, draft, batch, plan.num_draft_tokens, acceptance, plan.context, plan.rate_s
                )
            )
            advance()
    for assistant in (None, draft):
        rates.append(measure.transformers_rate(target, assistant, plan.num_draft_tokens, plan.num_generated))
        advance()
    return rates


if __name__ == "__main__":
    main()
