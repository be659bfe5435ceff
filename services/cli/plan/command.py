"""`outrider plan`: the command.

Owns: its options, and how answers are shown. Must not know: how they are found.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from services.cli.failure import CommandFailed
from services.cli.options import NUM_DRAFT_TOKENS
from services.cli.plan.capacity import LENGTHS, Fleet, Load, Point, best, fleet_for, sizes, sweep
from services.cli.plan.measured import Measured, read_times
from services.cli.plan.setting import Request, Times
from services.cli.terminal import notices, progress_bar, results

_MS = click.FloatRange(min=0)
DEFAULTS = Times(step_ms=20.0, token_ms=2.0)


class _Alphas(click.ParamType[tuple[float, ...]]):
    """A probability, or one for each position, separated by commas."""

    name = "alpha[,alpha...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        share = click.FloatRange(0, 1)
        return tuple(share(part, param, ctx) for part in str(value).split(","))


@click.command()
@click.option(
    "--from",
    "from_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Take the times from a report of `outrider bench --json`; options given beside it come first.",
)
@click.option("--step-ms", type=_MS, help="Target: a step, without its rows.  [default: 20]")
@click.option("--row-ms", type=_MS, help="Target: each row of a step.  [default: 0]")
@click.option("--token-ms", type=_MS, help="Draft: a token, of all sequences that draft together.  [default: 2]")
@click.option("--token-row-ms", type=_MS, help="Draft: each sequence beyond that.  [default: 0]")
@click.option(
    "--acceptance", "alphas", type=_Alphas(), help="Conditional acceptance, of all positions or each.  [default: 0.7]"
)
@click.option("--delay-ms", type=_MS, help="Network, one way, between coordinator and worker.  [default: 0.2]")
@click.option("--overhead-ms", type=_MS, help="Coordinator: work for a round.  [default: 0.5]")
@click.option("--prefill-token-ms", type=_MS, help="Target: each token of a prompt.")
@click.option(
    "--prompt-len",
    type=click.IntRange(min=0),
    help="Tokens of a prompt; 0 leaves prompts out, as if sequences never ended.  [default: with --from the report's]",
)
@click.option("--concurrency", type=click.IntRange(1, 1024), default=1, show_default=True, help="Sequences at once.")
@click.option("--num-draft-tokens", type=NUM_DRAFT_TOKENS, help="Draft tokens a round.  [default: auto, the best]")
@click.option("--requests-per-s", type=click.FloatRange(min=0, min_open=True), help="Load: requests a second.")
@click.option("--output-len", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens of an answer.")
@click.option("--tokens-per-s", type=click.FloatRange(min=0, min_open=True), help="Load, instead of requests.")
@click.option("--max-tpot-ms", type=click.FloatRange(min=0, min_open=True), help="Longest mean time a token.")
@click.option(
    "--max-ttft-ms", type=click.FloatRange(min=0, min_open=True), help="Longest mean time to the first token."
)
@click.option(
    "--max-sequences", type=click.IntRange(1, 1024), default=64, show_default=True, help="Most at once on a target."
)
@click.option(
    "--utilisation",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.8,
    show_default=True,
    help="Share of the targets' capacity that the load may take.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def plan(
    from_file: Path | None,
    concurrency: int,
    num_draft_tokens: int | None,
    prompt_len: int | None,
    requests_per_s: float | None,
    output_len: int,
    tokens_per_s: float | None,
    max_tpot_ms: float | None,
    max_ttft_ms: float | None,
    max_sequences: int,
    utilisation: float,
    as_json: bool,
    **given: Any,
) -> None:
    """Answer capacity questions by simulation: tokens/s, the best draft length, and how many workers a load needs.

    Shows what each draft length gives at --concurrency sequences on one target with one draft. With --requests-per-s or
    --tokens-per-s it also says how many targets and drafts that load needs. With --prompt-len each sequence is one
    request after the other: prefill takes its part of the target's time, and TTFT is in the answer.
    """
    if requests_per_s is not None and tokens_per_s is not None:
        raise click.UsageError("--requests-per-s and --tokens-per-s are two ways to say the load; give one of them")
    times, measured_len = read_times(from_file) if from_file else Measured(DEFAULTS, 0)
    times = dataclasses.replace(times, **{name: value for name, value in given.items() if value is not None})
    if times.step_ms <= 0:
        raise click.UsageError("--step-ms must be above 0")
    prompt_len = measured_len if prompt_len is None else prompt_len
    if prompt_len and from_file is None and given["prefill_token_ms"] is None:
        raise click.UsageError("--prompt-len needs the time of its tokens: --prefill-token-ms, or --from a report")
    request = Request(prompt_len, output_len) if prompt_len else None
    if max_ttft_ms is not None and request is None:
        raise click.UsageError("--max-ttft-ms needs --prompt-len")
    if requests_per_s is not None:
        tokens_per_s = requests_per_s * output_len
    lengths = LENGTHS if num_draft_tokens is None else tuple(sorted({0, num_draft_tokens}))
    points = sweep(times, concurrency, lengths, request)
    chosen = best(points) if num_draft_tokens is None else points[-1]
    fleet = None
    if tokens_per_s is not None:
        load = Load(tokens_per_s, request, max_sequences, max_tpot_ms, max_ttft_ms, utilisation)
        fleet = _fleet(times, load, lengths if num_draft_tokens is None else (num_draft_tokens,))
    if as_json:
        click.echo(json.dumps(_as_object(times, request, points, chosen, fleet, tokens_per_s), indent=2))
        return
    _print_points(points, chosen)
    if fleet is not None and tokens_per_s is not None:
        _print_fleet(fleet, tokens_per_s)


def _fleet(times: Times, load: Load, lengths: tuple[int, ...]) -> Fleet:
    with progress_bar(notices()) as progress:
        task = progress.add_task("simulating", total=len(sizes(load.max_sequences)))
        fleet = fleet_for(times, load, lengths, on_point=lambda: progress.advance(task))
    if fleet is None:
        bounds = (("a token", load.max_tpot_ms), ("the first token", load.max_ttft_ms))
        wanted = " and ".join(f"{what} within {ms:g} ms" for what, ms in bounds if ms is not None)
        raise CommandFailed(f"no number of sequences keeps {wanted}")
    return fleet


def _as_object(
    times: Times,
    request: Request | None,
    points: tuple[Point, ...],
    chosen: Point,
    fleet: Fleet | None,
    load: float | None,
) -> dict[str, object]:
    return {
        "times": dataclasses.asdict(times),
        "request": dataclasses.asdict(request) if request else None,
        "num_sequences": chosen.num_sequences,
        "best_num_draft_tokens": chosen.num_draft_tokens,
        "speedup": round(_speedup(points, chosen), 4),
        "points": [
            {"num_draft_tokens": p.num_draft_tokens}
            | {name: value and round(value, 4) for name, value in dataclasses.asdict(p.outcome).items()}
            for p in points
        ],
        "load_tokens_per_s": load,
        "fleet": dataclasses.asdict(fleet) if fleet else None,
    }


def _speedup(points: tuple[Point, ...], point: Point) -> float:
    """Against decoding without drafts, which is the first point."""
    return point.outcome.tokens_per_s / points[0].outcome.tokens_per_s


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _print_points(points: tuple[Point, ...], chosen: Point) -> None:
    sequences = "1 sequence" if chosen.num_sequences == 1 else f"{chosen.num_sequences} sequences"
    table = Table("K", "tokens/s", "TTFT ms", "TPOT ms", "tokens a round", "speed-up", "target busy", "draft busy")
    table.title = f"one target, one draft, {sequences}"
    for point in points:
        outcome = point.outcome
        table.add_row(
            str(point.num_draft_tokens),
            f"{outcome.tokens_per_s:.1f}",
            _ms(outcome.ttft_ms),
            f"{outcome.tpot_ms:.2f}",
            f"{outcome.tokens_per_round:.2f}",
            f"{_speedup(points, point):.2f}",
            f"{outcome.target_busy:.0%}",
            f"{outcome.draft_busy:.0%}",
            style="bold green" if point is chosen else None,
        )
    results().print(table)


def _print_fleet(fleet: Fleet, tokens_per_s: float) -> None:
    table = Table("targets", "drafts", "K", "sequences on a target", "TTFT ms", "TPOT ms", "capacity, tokens/s")
    table.title = f"for {tokens_per_s:g} tokens/s"
    table.add_row(
        str(fleet.num_targets),
        str(fleet.num_drafts),
        str(fleet.num_draft_tokens),
        str(fleet.num_sequences),
        _ms(fleet.ttft_ms),
        f"{fleet.tpot_ms:.2f}",
        f"{fleet.tokens_per_s:.1f}",
    )
    results().print(table)
