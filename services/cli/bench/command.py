"""`outrider bench`: the command.

Owns: its options and what they select. Must not know: how load is sent or numbers are made.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import click

from services.cli.bench.load import LoadPlan
from services.cli.bench.machine import environment
from services.cli.bench.overhead import cpu_ratio, measure_overhead, print_overhead
from services.cli.bench.report import FormulaCheck, Report, build_report, check_formula
from services.cli.bench.run import RunOutcome, run_load
from services.cli.bench.sample import Mode
from services.cli.bench.show import as_object, print_report
from services.cli.cluster import SIMULATED, Cluster, ClusterSpec
from services.cli.failure import CommandFailed, describe
from services.cli.options import address_option, cluster_options, decode_options
from services.cli.prompts import OWN_PROMPTS, Conversation, load_prompts, spread
from services.cli.terminal import Stages, notices, results
from services.client import GenerateOptions
from services.common.errors import OutriderError
from services.common.values import VerificationMethod

_FILE = click.Path(path_type=Path, dir_okay=False)
_MODES = {
    "both": (Mode.PLAIN, Mode.SPECULATIVE),
    "plain": (Mode.PLAIN,),
    "speculative": (Mode.SPECULATIVE,),
}


class Where(NamedTuple):
    """A running coordinator, or a cluster to start."""

    address: str | None
    spec: ClusterSpec


@click.command()
@click.option("--prompts", type=_FILE, default=OWN_PROMPTS, help="Prompt file, JSON Lines.  [default: Outrider's own]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens a request.")
@click.option("--limit", type=click.IntRange(min=1), help="Use at most so many prompts, spread over the categories.")
@click.option(
    "--concurrency", type=click.IntRange(min=1), help="Closed loop: so many conversations at a time.  [default: 1]"
)
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Open loop: conversations a second, Poisson.")
@click.option(
    "--mode",
    type=click.Choice(tuple(_MODES)),
    default="both",
    show_default=True,
    help="With speculation, without, or both in turns.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63),
    default=0,
    show_default=True,
    help="Of arrivals, and of the requests' noise.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@decode_options
@click.option(
    "--all-turns", is_flag=True, help="Send every turn of a conversation, in one session; else the first only."
)
@click.option("--raw", is_flag=True, help="Send prompts without the model's chat template.")
@click.option("--ignore-eos", is_flag=True, help="Go on after end-of-sequence tokens, up to max-tokens.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Requests before measuring, in each mode.",
)
@address_option(default=None, help="Measure this coordinator instead of starting a cluster.")
@cluster_options
@click.option("--overhead", is_flag=True, help="Instead: what a round costs the coordinator at 1 and 64 sessions.")
@click.option("--json", "json_file", type=_FILE, help="Write the report to this file; - is standard output.")
def bench(
    prompts: Path,
    limit: int | None,
    mode: str,
    max_tokens: int,
    temperature: float,
    verification: str,
    num_draft_tokens: int | None,
    ignore_eos: bool,
    warmup: int,
    address: str | None,
    spec: ClusterSpec,
    overhead: bool,
    json_file: Path | None,
    concurrency: int | None,
    rate: float | None,
    seed: int,
    raw: bool,
    all_turns: bool,
) -> None:
    """Measure throughput, latency and acceptance over a prompt file, with and without speculation.

    Starts a cluster of its own and stops it, unless --address or OUTRIDER_ADDRESS names one. Plain and speculative
    requests alternate, so that a noisy machine treats both alike. With a simulated cluster the measured speed-up is
    shown beside the formula's. Ends with status 1 if a request failed.
    """
    if rate is not None and concurrency is not None:
        raise click.UsageError("--rate is an open loop, --concurrency a closed one; give one of them")
    _check_writable(json_file)
    options = GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        verification=VerificationMethod(verification),
        num_draft_tokens=num_draft_tokens,
        ignore_eos=ignore_eos,
    )
    plan = LoadPlan(options, _MODES[mode], concurrency or 1, rate, seed, raw, all_turns, warmup)
    conversations = spread(load_prompts(prompts), limit)
    try:
        if overhead:
            _bench_overhead(plan, conversations[0], json_file)
        else:
            _bench_prompts(Where(address, spec), plan, conversations, json_file)
    except OutriderError as error:
        raise CommandFailed(describe(error, address)) from None


def _bench_prompts(
    where: Where, plan: LoadPlan, conversations: tuple[Conversation, ...], json_file: Path | None
) -> None:
    outcome = _run(where, plan, conversations)
    report = build_report(outcome.blocks, outcome.cpu_ms)
    formula = _formula(where, plan, report)
    if json_file != Path("-"):
        print_report(report, results(), formula)
    _write_json(json_file, as_object(report, environment(sys.argv[1:]), formula))
    if report.failed_requests:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.failures.items())
        raise CommandFailed(f"{report.failed_requests} requests failed: {reasons}")


def _run(where: Where, plan: LoadPlan, conversations: tuple[Conversation, ...]) -> RunOutcome:
    console = notices()
    if where.address is not None:
        return asyncio.run(run_load(where.address, conversations, plan, console))
    with Stages(console) as stages, Cluster(where.spec, stages.show) as cluster:
        stages.stop()
        pid = cluster.pid_of("coordinator")
        return asyncio.run(run_load(cluster.address, conversations, plan, console, pid))


def _formula(where: Where, plan: LoadPlan, report: Report) -> FormulaCheck | None:
    """Only for a simulated cluster started here, a fixed draft length and one request at a time, as it assumes."""
    spec = where.spec
    simulated = spec.target == SIMULATED and spec.drafter == SIMULATED and spec.simulated_step_ms > 0
    if where.address is not None or not simulated or plan.concurrency != 1 or plan.rate is not None:
        return None
    if plan.options.num_draft_tokens is None:
        return None
    return check_formula(report, plan.options.num_draft_tokens, spec.simulated_token_ms / spec.simulated_step_ms)


def _bench_overhead(plan: LoadPlan, conversation: Conversation, json_file: Path | None) -> None:
    reports = measure_overhead(plan, conversation, notices())
    if json_file != Path("-"):
        print_overhead(reports, results())
    fields: dict[str, object] = {
        "sessions": [dataclasses.asdict(report) for report in reports],
        "cpu_ratio": cpu_ratio(reports),
        "failed_requests": sum(report.failed_requests for report in reports),
        "environment": dataclasses.asdict(environment(sys.argv[1:])),
    }
    _write_json(json_file, fields)
    if any(report.failed_requests for report in reports):
        raise CommandFailed(f"{fields['failed_requests']} requests failed")


def _check_writable(json_file: Path | None) -> None:
    """Raises CommandFailed before anything is measured, rather than lose the report."""
    if json_file is None or json_file == Path("-"):
        return
    try:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.open("a").close()
    except OSError as error:
        raise CommandFailed(f"cannot write {json_file}: {error.strerror}") from None


def _write_json(json_file: Path | None, fields: dict[str, object]) -> None:
    if json_file is None:
        return
    text = json.dumps(fields, indent=2)
    if json_file == Path("-"):
        click.echo(text)
        return
    json_file.write_text(text + "\n")
