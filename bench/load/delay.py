"""A slow network between the coordinator and its workers, against what `outrider plan` says of it.

Owns: that comparison. Must not know: how it is shown.

Proxies stand before both workers. What the workers take for a round, and what it takes beside that, is measured without
a delay, as a user would measure it on one machine. The planner gets that, the delay that was injected, and the
acceptance that the run realised. Nothing else of the delayed run goes in.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.draft_length.measure import Runner, Taken, alphas_of
from bench.goals import Goal
from bench.load.cluster import COORDINATOR, LoadCluster, simulated
from bench.proxy import ProxyThread, round_trip_ms
from services.cli.plan.setting import Setting, Times
from services.cli.plan.simulation import simulate

MAX_ERROR = 0.05
WORKERS = ("target", "draft")


@dataclass(frozen=True, slots=True)
class DelayPlan:
    """`delay_ms` is that of each way between coordinator and worker."""

    delay_ms: float = 5.0
    sizes: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = (2, 4, 8)
    num_tokens: int = 160
    num_repeats: int = 2
    step_ms: float = 40.0
    token_ms: float = 4.0

    @property
    def num_runs(self) -> int:
        return 2 * self.num_repeats * len(self.sizes) * len(self.lengths)


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of generations at once and one draft length."""

    num_sequences: int
    num_draft_tokens: int
    tokens_per_s: float
    """Median of the runs."""
    planned_per_s: float
    undelayed_per_s: float
    undelayed_planned_per_s: float
    times: Times
    """What the planner was given without the delay, but for the acceptance."""

    @property
    def ratio(self) -> float:
        return round(self.tokens_per_s / self.planned_per_s, 4)


@dataclass(frozen=True, slots=True)
class DelayFigures:
    delay_ms: float
    round_trip_ms: dict[str, tuple[float, float]]
    """Of a call through each worker's proxy, without and with the delay."""
    cells: tuple[Cell, ...]

    @property
    def goals(self) -> tuple[Goal, ...]:
        return tuple(
            Goal(
                f"{cell.num_sequences} at once, K = {cell.num_draft_tokens}: tokens/s over planned",
                cell.ratio,
                most=1 + MAX_ERROR,
                least=1 - MAX_ERROR,
            )
            for cell in self.cells
        )


def measure(plan: DelayPlan, on_run: Callable[[], None] = lambda: None) -> DelayFigures:
    """Starts a cluster; `on_run` is called after each of the plan's num_runs."""
    with contextlib.ExitStack() as stack:
        proxies = {name: stack.enter_context(ProxyThread()) for name in WORKERS}
        cluster = stack.enter_context(LoadCluster(simulated(plan.step_ms, plan.token_ms), proxies=proxies))
        one_way_s, round_trips = _calibrate(proxies, plan.delay_ms)
        runner = Runner(cluster.address, cluster.pid_of(COORDINATOR))
        runs: dict[tuple[int, int, bool], list[Taken]] = {}
        asyncio.run(runner.run(1, 4, 64))
        for _ in range(plan.num_repeats):
            for size in plan.sizes:
                for length in plan.lengths:
                    for delayed in (False, True):
                        for name, proxy in proxies.items():
                            proxy.proxy.delay_s = one_way_s[name] if delayed else 0.0
                        taken = asyncio.run(runner.run(size, length, plan.num_tokens))
                        runs.setdefault((size, length, delayed), []).append(taken)
                        on_run()
    delays_ms = [(later - before) / 2 for before, later in round_trips.values()]
    cells = []
    for size, length in itertools.product(plan.sizes, plan.lengths):
        quick, slow = runs[size, length, False], runs[size, length, True]
        times = _undelayed_times(runs[min(plan.sizes), length, False], quick)
        cells.append(_cell(times, statistics.fmean(delays_ms), size, length, quick, slow))
    return DelayFigures(plan.delay_ms, round_trips, tuple(cells))


def _calibrate(
    proxies: dict[str, ProxyThread], delay_ms: float
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Seconds that each proxy must hold what passes, and the milliseconds of a call without and with that."""
    one_way_s, round_trips = {}, {}
    for name, proxy in proxies.items():
        with grpc.insecure_channel(proxy.proxy.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def ping(stub: health_pb2_grpc.HealthStub = stub) -> object:
                return stub.Check(health_pb2.HealthCheckRequest())

            one_way_s[name] = proxy.calibrate(2 * delay_ms, ping)
            delayed_ms = round_trip_ms(ping)
            proxy.proxy.delay_s = 0.0
            round_trips[name] = (round(round_trip_ms(ping), 3), round(delayed_ms, 3))
    return one_way_s, round_trips


def _cell(times: Times, delay_ms: float, size: int, length: int, quick: Sequence[Taken], slow: Sequence[Taken]) -> Cell:
    later = dataclasses.replace(times, delay_ms=times.delay_ms + delay_ms)
    return Cell(
        num_sequences=size,
        num_draft_tokens=length,
        tokens_per_s=_rate(slow),
        planned_per_s=_planned(later, size, length, slow),
        undelayed_per_s=_rate(quick),
        undelayed_planned_per_s=_planned(times, size, length, quick),
        times=times,
    )


def _undelayed_times(alone: Sequence[Taken], runs: Sequence[Taken]) -> Times:
    """The workers' own times and the network's from generations that run alone; the coordinator's work for a round, its
    CPU time, from as many at once as are planned for."""
    rounds = [r for taken in alone for s in taken.statistics for r in s.rounds if r.num_draft_tokens]
    beside_ms = statistics.median(taken.overhead_ms for taken in alone) - statistics.fmean(t.cpu_ms for t in alone)
    return Times(
        step_ms=statistics.fmean(r.verify_ms for r in rounds),
        token_ms=statistics.fmean(r.draft_ms / r.num_draft_tokens for r in rounds),
        delay_ms=max(0.0, beside_ms) / 4,
        overhead_ms=statistics.fmean(taken.cpu_ms for taken in runs),
    )


def _rate(runs: Sequence[Taken]) -> float:
    return round(statistics.median(taken.tokens_per_s for taken in runs), 2)


def _planned(times: Times, size: int, length: int, runs: Sequence[Taken]) -> float:
    alphas = alphas_of(tuple(s for taken in runs for s in taken.statistics))
    setting = Setting(size, length, num_rounds=max(60, 1000 // size))
    return round(simulate(dataclasses.replace(times, alphas=alphas), setting).tokens_per_s, 2)
