"""Rates of many generations at once, on a cluster of processes with simulated workers.

Owns: one cell's runs. Must not know: how cells are shown. Each run counts the tokens that arrive between the moment
when every generation has some and the moment when the first ends, so that all run all the time.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from services.cli.bench.machine import cpu_time_ms
from services.cli.cluster import SIMULATED, Cluster, ClusterSpec
from services.cli.plan.setting import Setting, Times
from services.cli.plan.simulation import simulate
from services.client import GenerateOptions, OutriderClient, Statistics

LENGTHS = (0, 1, 2, 4, 6, 8, 12)
DRAFTERS = {"good": (0.85, 2.5), "poor": (0.35, 2.5), "useless": (0.02, 5.0)}
"""Acceptance, and milliseconds of a drafted token."""
STEP_MS, ROW_MS = 50.0, 0.1
FEW = 4
"""Fewer sequences than these get more tokens each, so that luck with what is accepted counts less."""
SKIPPED = 32
"""Tokens of each generation before counting begins."""


@dataclass(frozen=True, slots=True)
class Run:
    """One number of sequences at one length; None: adaptive. `planned_per_s` is what plan makes of the run's times."""

    num_draft_tokens: int | None
    tokens_per_s: float
    mean_draft_len: float
    """Draft tokens a round, plainly decoded tokens included as rounds."""
    planned_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """All lengths for one drafter and one number of sequences."""

    drafter: str
    num_sequences: int
    runs: tuple[Run, ...]

    def rate(self, num_draft_tokens: int | None) -> float:
        return next(run.tokens_per_s for run in self.runs if run.num_draft_tokens == num_draft_tokens)

    @property
    def best(self) -> Run:
        """Of the fixed lengths."""
        return max((r for r in self.runs if r.num_draft_tokens is not None), key=lambda run: run.tokens_per_s)

    @property
    def over_plain(self) -> float:
        return self.rate(None) / self.rate(0)

    @property
    def over_best(self) -> float:
        return self.rate(None) / self.best.tokens_per_s


def measure(
    drafter: str, sizes: tuple[int, ...], num_tokens: int, lengths: tuple[int, ...], on_run: Callable[[], None]
) -> list[Cell]:
    """The cells of one drafter, on one cluster: its coordinator goes on learning from run to run."""
    acceptance, token_ms = DRAFTERS[drafter]
    spec = ClusterSpec(
        target=SIMULATED,
        drafter=SIMULATED,
        simulated_step_ms=STEP_MS,
        simulated_row_ms=ROW_MS,
        simulated_token_ms=token_ms,
        simulated_acceptance=acceptance,
    )
    with Cluster(spec) as cluster:
        runner = Runner(cluster.address, cluster.pid_of("coordinator"))
        alone = asyncio.run(runner.run(1, 4, num_tokens))
        delay_ms = max(0.0, alone.overhead_ms - alone.cpu_ms) / 4
        times = Times(STEP_MS, ROW_MS, token_ms, delay_ms=delay_ms)
        cells = []
        for size in sizes:
            runs = []
            for length in (*lengths, None):
                taken = asyncio.run(runner.run(size, length, num_tokens * max(1, FEW // size)))
                runs.append(taken.as_run(length, size, times))
                on_run()
            cells.append(Cell(drafter, size, tuple(runs)))
    return cells


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run gave."""

    tokens_per_s: float
    cpu_ms: float
    """The coordinator's, a round."""
    overhead_ms: float
    """Median of a round's."""
    statistics: tuple[Statistics, ...]

    def as_run(self, num_draft_tokens: int | None, num_sequences: int, times: Times) -> Run:
        num_rounds = sum(s.num_rounds for s in self.statistics)
        num_drafted = sum(s.num_draft_tokens for s in self.statistics)
        planned = None
        if num_draft_tokens is not None:
            times = replace(times, alphas=alphas_of(self.statistics), overhead_ms=self.cpu_ms)
            setting = Setting(num_sequences, num_draft_tokens, num_rounds=max(60, 1000 // num_sequences))
            planned = simulate(times, setting).tokens_per_s
        return Run(num_draft_tokens, self.tokens_per_s, num_drafted / num_rounds, planned)


class Runner:
    """Runs on one cluster, whose coordinator is the process of that id."""

    def __init__(self, address: str, coordinator_pid: int) -> None:
        self._address = address
        self._pid = coordinator_pid

    async def run(self, num_sequences: int, num_draft_tokens: int | None, num_tokens: int) -> Taken:
        options = GenerateOptions(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, num_draft_tokens=num_draft_tokens
        )
        before_ms = cpu_time_ms(self._pid) or 0.0
        async with OutriderClient(self._address) as client:
            taken = await asyncio.gather(*[_arrivals(client, f"prompt {n}", options) for n in range(num_sequences)])
        cpu_ms = (cpu_time_ms(self._pid) or 0.0) - before_ms
        statistics_ = tuple(s for _, s in taken)
        overheads = [ms for s in statistics_ for ms in s.overhead_ms]
        return Taken(
            _rate([arrivals for arrivals, _ in taken]),
            cpu_ms / sum(s.num_rounds for s in statistics_),
            statistics.median(overheads) if overheads else 0.0,
            statistics_,
        )


Arrivals = list[tuple[float, int]]
"""When, and how many tokens there were then."""


async def _arrivals(client: OutriderClient, prompt: str, options: GenerateOptions) -> tuple[Arrivals, Statistics]:
    generation = client.generate(prompt, options)
    arrivals: Arrivals = []
    async for chunk in generation:
        if chunk.tokens:
            arrivals.append((time.perf_counter(), chunk.offset + len(chunk.tokens)))
    return arrivals, generation.result.statistics


def _rate(all_arrivals: list[Arrivals]) -> float:
    """Tokens a second while all run. Each generation counts from its last arrival before to its last one within."""
    begins = max(next(at for at, n in arrivals if n >= SKIPPED) for arrivals in all_arrivals)
    ends = min(arrivals[-1][0] for arrivals in all_arrivals)
    rates = []
    for arrivals in all_arrivals:
        first = next((at, n) for at, n in arrivals if at >= begins)
        last = [(at, n) for at, n in arrivals if at <= ends][-1]
        if last[0] > first[0]:
            rates.append((last[1] - first[1]) / (last[0] - first[0]))
    return len(all_arrivals) * statistics.fmean(rates)


def alphas_of(taken: tuple[Statistics, ...]) -> tuple[float, ...]:
    """Conditional acceptance that the run realised."""
    width = max(len(s.num_verified_tokens_per_pos) for s in taken)
    pairs = [
        (
            sum(s.num_accepted_tokens_per_pos[i] for s in taken if i < len(s.num_accepted_tokens_per_pos)),
            sum(s.num_verified_tokens_per_pos[i] for s in taken if i < len(s.num_verified_tokens_per_pos)),
        )
        for i in range(width)
    ]
    return tuple(accepted / verified for accepted, verified in pairs) or (0.0,)
