"""A thousand sessions at once, at a round a second each or more, on one coordinator and on two.

Owns: that comparison. Must not know: how it is shown.

Every session has a connection of its own. Two coordinators share the workers and the store; phases on one and on both
take turns. A coordinator's CPU time counts while all sessions run, against the rounds that were made meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from bench.goals import Goal, ratio
from bench.load.cluster import COORDINATOR, LoadCluster, simulated
from bench.load.requests import NO_RETRY
from services.cli.bench.report import Percentiles
from services.client import GenerateOptions, OutriderClient
from services.common.errors import OutriderError

MAX_CPU_RATIO = 1.1
LEAST_ROUNDS_PER_S = 1.0
"""Of each session."""
_PROMPT = "Tell me of the sea, and of ships."
"""One for all, of two blocks and a token, so that prefill holds no rounds up; seeds make the sessions differ."""
_POLL_S = 0.1
_OPENING_GAP_S = 0.02
_MAX_OPENING_S, _MAX_ENDING_S = 90.0, 30.0
_NEVER_ENDING = 30_000


@dataclass(frozen=True, slots=True)
class SessionsPlan:
    """`step_ms` and `token_ms` make a round of 4 draft tokens last somewhat less than a second, with what the burst of
    all sessions takes on two cores: opened one after the other, they share two steps of the target that take turns."""

    num_sessions: int = 1000
    num_seconds: float = 15.0
    num_repeats: int = 2
    step_ms: float = 300.0
    token_ms: float = 5.0


@dataclass(frozen=True, slots=True)
class Run:
    """One phase. CPU time is that of all coordinators that had sessions, a round."""

    num_coordinators: int
    num_rounds: int
    cpu_ms_per_round: float | None
    rounds_per_s_a_session: float
    num_failed: int
    num_stalled: int
    """Sessions that got no token while it lasted."""
    errors: dict[str, int]
    gap_ms: Percentiles
    """Between two messages with tokens of a session."""
    max_fds: int
    """Of a coordinator."""


@dataclass(frozen=True, slots=True)
class SessionsFigures:
    num_sessions: int
    num_connections: int
    max_fds_allowed: int
    runs: tuple[Run, ...]

    def cpu_ms_per_round(self, num_coordinators: int) -> float | None:
        """Median over the phases."""
        found = [run.cpu_ms_per_round for run in self.runs if run.num_coordinators == num_coordinators]
        known = [ms for ms in found if ms is not None]
        return round(statistics.median(known), 5) if known else None

    @property
    def goals(self) -> tuple[Goal, ...]:
        return (
            Goal("failed sessions", sum(run.num_failed for run in self.runs), 0),
            Goal("sessions without a token in a phase", sum(run.num_stalled for run in self.runs), 0),
            Goal(
                "rounds a second and session",
                min(run.rounds_per_s_a_session for run in self.runs),
                least=LEAST_ROUNDS_PER_S,
            ),
            Goal(
                "CPU time a round, two coordinators over one",
                ratio(self.cpu_ms_per_round(2), self.cpu_ms_per_round(1)),
                MAX_CPU_RATIO,
            ),
        )


def measure(plan: SessionsPlan, on_phase: Callable[[], None] = lambda: None) -> SessionsFigures:
    """Starts a cluster; `on_phase` is called after each of 2 * num_repeats phases."""
    # connections of a phase may still be closing when the next one's are opened
    room = str(plan.num_sessions + 24)
    flags = {COORDINATOR: ("--max-generations", room, "--max-connections", str(2 * plan.num_sessions + 64))}
    spec = simulated(plan.step_ms, plan.token_ms, max_sequences=plan.num_sessions + 24)
    with LoadCluster(spec, flags, num_coordinators=2) as cluster:
        runs = asyncio.run(_runs(plan, cluster, on_phase))
        limit = psutil.Process(cluster.pid_of(COORDINATOR)).rlimit(psutil.RLIMIT_NOFILE)[0]
    return SessionsFigures(plan.num_sessions, plan.num_sessions, limit, tuple(runs))


async def _runs(plan: SessionsPlan, cluster: LoadCluster, on_phase: Callable[[], None]) -> list[Run]:
    runs = []
    for number in range(2 * plan.num_repeats):
        used = cluster.coordinators[: 1 + number % 2]
        phase = _Phase(plan, [cluster.address_of(n) for n in used], [cluster.pid_of(n) for n in used])
        runs.append(await phase.run())
        await _until_none_runs(phase.addresses)
        on_phase()
    return runs


async def _until_none_runs(addresses: Sequence[str]) -> None:
    """Until the coordinators have noticed that the sessions' clients are gone, and have freed what they held."""
    deadline_s = time.perf_counter() + _MAX_ENDING_S
    for address in addresses:
        async with OutriderClient(address) as client:
            while time.perf_counter() < deadline_s:
                status = await client.get_cluster_status()
                if not status.num_requests_running + status.num_requests_waiting:
                    break
                await asyncio.sleep(_POLL_S)


class _Phase:
    """Sessions spread evenly over coordinators."""

    def __init__(self, plan: SessionsPlan, addresses: Sequence[str], pids: Sequence[int]) -> None:
        self._plan = plan
        self.addresses = addresses
        self._processes = [psutil.Process(pid) for pid in pids]
        self._arrivals: list[list[float]] = [[] for _ in range(plan.num_sessions)]
        self._errors: list[OutriderError] = []

    async def run(self) -> Run:
        plan = self._plan
        tasks = [asyncio.create_task(self._session(number)) for number in range(plan.num_sessions)]
        try:
            await self._until_all_run()
            async with contextlib.AsyncExitStack() as stack:
                watchers = [await stack.enter_async_context(OutriderClient(at)) for at in self.addresses]
                before, began_s = await _activity(watchers), time.perf_counter()
                await asyncio.sleep(plan.num_seconds)
                after, ended_s = await _activity(watchers), time.perf_counter()
            max_fds = max(process.num_fds() for process in self._processes)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._figures(before, after, began_s, ended_s, max_fds)

    async def _session(self, number: int) -> None:
        address = self.addresses[number % len(self.addresses)]
        options = GenerateOptions(max_tokens=_NEVER_ENDING, temperature=1.0, ignore_eos=True, seed=number)
        await asyncio.sleep(number * _OPENING_GAP_S)
        async with OutriderClient(address, retry=NO_RETRY) as client:
            generation = client.generate(_PROMPT, options)
            try:
                async with contextlib.aclosing(generation):
                    async for chunk in generation:
                        if chunk.tokens:
                            self._arrivals[number].append(time.perf_counter())
            except OutriderError as error:
                self._errors.append(error)

    async def _until_all_run(self) -> None:
        """Until each has had two messages, or has failed."""
        deadline_s = time.perf_counter() + _MAX_OPENING_S
        while time.perf_counter() < deadline_s:
            if sum(len(arrivals) >= 2 for arrivals in self._arrivals) + len(self._errors) >= len(self._arrivals):
                return
            await asyncio.sleep(_POLL_S)

    def _figures(self, before: _Activity, after: _Activity, began_s: float, ended_s: float, max_fds: int) -> Run:
        within = [[at for at in arrivals if began_s <= at <= ended_s] for arrivals in self._arrivals]
        gaps = [(later - earlier) * 1e3 for arrivals in within for earlier, later in itertools.pairwise(arrivals)]
        num_rounds = after.num_rounds - before.num_rounds
        cpu_ms = (after.cpu_ns - before.cpu_ns) / 1e6
        errors = Counter(error.reason for error in self._errors)
        return Run(
            num_coordinators=len(self.addresses),
            num_rounds=num_rounds,
            cpu_ms_per_round=round(cpu_ms / num_rounds, 5) if num_rounds else None,
            rounds_per_s_a_session=round(num_rounds / (ended_s - began_s) / len(self._arrivals), 3),
            num_failed=len(self._errors),
            num_stalled=sum(not arrivals for arrivals in within),
            errors=dict(errors),
            gap_ms=Percentiles.of(gaps),
            max_fds=max_fds,
        )


class _Activity(NamedTuple):
    num_rounds: int
    cpu_ns: int


async def _activity(watchers: Sequence[OutriderClient]) -> _Activity:
    """Of all coordinators together."""
    found = [(await watcher.get_cluster_status()).activity for watcher in watchers]
    return _Activity(sum(a.num_rounds for a in found), sum(a.cpu_ns for a in found))
