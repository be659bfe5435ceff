"""`outrider bench --overhead`: what a round costs the coordinator at 1 and 64 sessions, on workers without latency.

Owns: that comparison. Must not know: how load is sent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from services.cli.bench.load import Block, LoadPlan
from services.cli.bench.report import Percentiles
from services.cli.bench.run import run_load
from services.cli.bench.sample import Mode, Sample
from services.cli.bench.show import number
from services.cli.cluster import SIMULATED, Cluster, ClusterSpec
from services.cli.failure import CommandFailed
from services.cli.prompts import Conversation
from services.cli.terminal import Stages
from services.common.values import DEFAULT_NUM_DRAFT_TOKENS

NUM_SESSIONS = (1, 64)
_NUM_REPEATS = 3
_PATIENCE_MS = 60_000.0
_CONVERSATIONS = {1: 8, 64: 128}


@dataclass(frozen=True, slots=True)
class OverheadReport:
    """At one number of sessions; the CPU time is the median over repeats, of all time the coordinator used / rounds."""

    num_sessions: int
    num_rounds: int
    num_drafts: int
    """Rounds with a draft; there is none before the draft worker has computed the prompt."""
    failed_requests: int
    cpu_ms_per_round: float
    coordinator_overhead_ms: Percentiles
    tokens_per_s: float


def measure_overhead(plan: LoadPlan, conversation: Conversation, console: Console) -> tuple[OverheadReport, ...]:
    """Starts a simulated cluster without latencies; the numbers of sessions alternate. Raises CommandFailed.

    Drafts a fixed number of tokens, however long that takes: as many as pay, where a target's tokens cost nothing, are
    none.
    """
    if plan.options.num_draft_tokens is None:
        plan = dataclasses.replace(
            plan, options=dataclasses.replace(plan.options, num_draft_tokens=DEFAULT_NUM_DRAFT_TOKENS)
        )
    spec = ClusterSpec(
        target=SIMULATED,
        drafter=SIMULATED,
        simulated_step_ms=0.0,
        simulated_row_ms=0.0,
        simulated_token_ms=0.0,
        min_propose_ms=_PATIENCE_MS,
    )
    blocks: dict[int, list[Block]] = {count: [] for count in NUM_SESSIONS}
    cpu_per_round: dict[int, list[float]] = {count: [] for count in NUM_SESSIONS}
    with Stages(console) as stages, Cluster(spec, stages.show) as cluster:
        stages.stop()
        for _ in range(_NUM_REPEATS):
            for count in NUM_SESSIONS:
                once = dataclasses.replace(plan, modes=(Mode.SPECULATIVE,), concurrency=count)
                conversations = [conversation] * _CONVERSATIONS[count]
                pid = cluster.pid_of("coordinator")
                outcome = asyncio.run(run_load(cluster.address, conversations, once, console, pid))
                if outcome.cpu_ms is None:
                    raise CommandFailed("a process's CPU time cannot be read on this system")
                blocks[count] += outcome.blocks
                cpu_per_round[count].append(outcome.cpu_ms[Mode.SPECULATIVE] / max(1, _num_rounds(outcome.blocks)))
    return tuple(_report(count, blocks[count], cpu_per_round[count]) for count in NUM_SESSIONS)


def cpu_ratio(reports: Sequence[OverheadReport]) -> float:
    """CPU time a round with the most sessions over that with the fewest."""
    return round(reports[-1].cpu_ms_per_round / reports[0].cpu_ms_per_round, 4)


def print_overhead(reports: Sequence[OverheadReport], console: Console) -> None:
    table = Table("sessions", "rounds", "drafted", "failed", "CPU ms a round", "overhead ms p50 / p99", "tokens/s")
    for report in reports:
        table.add_row(
            str(report.num_sessions),
            str(report.num_rounds),
            str(report.num_drafts),
            str(report.failed_requests),
            number(report.cpu_ms_per_round, 4),
            f"{number(report.coordinator_overhead_ms.p50)} / {number(report.coordinator_overhead_ms.p99)}",
            number(report.tokens_per_s),
        )
    console.print(table)
    most, fewest = reports[-1].num_sessions, reports[0].num_sessions
    console.print(f"CPU time a round, {most} sessions over {fewest}: {cpu_ratio(reports):.3f}")


def _samples(blocks: Sequence[Block]) -> list[Sample]:
    return [outcome for block in blocks for outcome in block.outcomes if isinstance(outcome, Sample)]


def _num_rounds(blocks: Sequence[Block]) -> int:
    return sum(sample.statistics.num_rounds for sample in _samples(blocks))


def _report(count: int, blocks: list[Block], cpu_per_round: list[float]) -> OverheadReport:
    samples = _samples(blocks)
    wall_s = sum(block.wall_ns for block in blocks) / 1e9
    return OverheadReport(
        num_sessions=count,
        num_rounds=_num_rounds(blocks),
        num_drafts=sum(sample.statistics.num_drafts for sample in samples),
        failed_requests=sum(len(block.outcomes) for block in blocks) - len(samples),
        cpu_ms_per_round=round(statistics.median(cpu_per_round), 5),
        coordinator_overhead_ms=Percentiles.of(ms for sample in samples for ms in sample.statistics.overhead_ms),
        tokens_per_s=round(sum(sample.num_tokens for sample in samples) / wall_s, 1),
    )
