"""Three times as many requests as the service can take.

Owns: that comparison. Must not know: how it is shown.

At capacity, every place that the coordinator has is taken all the time. The overload is an open loop: Poisson arrivals
at three times the rate at which requests were finished at capacity, whatever becomes of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from bench.goals import Goal, ratio
from bench.load.cluster import COORDINATOR, LoadCluster, simulated
from bench.load.requests import NO_RETRY, Answer, Requests, after, reasons, tpot_of
from bench.load.watch import Watched, watching
from services.cli.bench.report import Percentiles
from services.client import GenerateOptions, OutriderClient
from services.common.errors import ResourceExhausted

OVERLOAD = 3.0
MAX_TPOT_RATIO, MAX_REFUSAL_MS, MAX_RSS_RATIO = 1.5, 100.0, 1.1
SERVICES = (COORDINATOR, "target", "draft")


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    """`num_places`: generations that the coordinator takes at once. Both phases take turns."""

    num_places: int = 32
    num_tokens: int = 96
    phase_s: float = 20.0
    num_repeats: int = 3
    step_ms: float = 40.0
    token_ms: float = 2.0


@dataclass(frozen=True, slots=True)
class Phase:
    """All of one kind. `refusal_ms`: until a refused request had its answer."""

    offered_per_s: float
    num_requests: int
    num_finished: int
    num_refused: int
    num_refused_without_delay: int
    other_errors: dict[str, int]
    tpot_ms: Percentiles
    ttft_ms: Percentiles
    refusal_ms: Percentiles
    retry_delay_ms: Percentiles
    max_running: int
    max_waiting: int
    max_target_queue: int
    max_rss_mib: dict[str, float]


@dataclass(frozen=True, slots=True)
class OverloadFigures:
    num_places: int
    finished_per_s: float
    """At capacity."""
    at_capacity: Phase
    overload: Phase

    @property
    def goals(self) -> tuple[Goal, ...]:
        over, base = self.overload, self.at_capacity
        growth = [ratio(over.max_rss_mib.get(name), base.max_rss_mib.get(name)) for name in SERVICES]
        return (
            Goal("admitted: p99 TPOT over that at capacity", ratio(over.tpot_ms.p99, base.tpot_ms.p99), MAX_TPOT_RATIO),
            Goal("refused: p99 ms to the answer", over.refusal_ms.p99, MAX_REFUSAL_MS),
            Goal("refused without a retry delay", over.num_refused_without_delay, 0),
            Goal("other errors", sum(over.other_errors.values()), 0),
            Goal("generations that ran or waited at once", over.max_running + over.max_waiting, 2 * self.num_places),
            Goal("largest RSS over that at capacity", max(r or 0.0 for r in growth), MAX_RSS_RATIO),
        )


def measure(plan: OverloadPlan, on_phase: Callable[[], None] = lambda: None) -> OverloadFigures:
    """Starts a cluster; `on_phase` is called after each of 2 * num_repeats phases."""
    flags = {COORDINATOR: ("--max-generations", str(plan.num_places))}
    with LoadCluster(simulated(plan.step_ms, plan.token_ms), flags) as cluster:
        return asyncio.run(_Runner(plan, cluster, on_phase).run())


class _Runner:
    def __init__(self, plan: OverloadPlan, cluster: LoadCluster, on_phase: Callable[[], None]) -> None:
        self._plan = plan
        self._address = cluster.address
        self._pids = {name: cluster.pid_of(name) for name in SERVICES}
        self._on_phase = on_phase

    async def run(self) -> OverloadFigures:
        plan = self._plan
        options = GenerateOptions(max_tokens=plan.num_tokens, temperature=0.0, ignore_eos=True)
        capacity: list[Answer] = []
        overload: list[Answer] = []
        seen: tuple[list[Watched], list[Watched]] = ([], [])
        async with OutriderClient(self._address, retry=NO_RETRY) as client:
            requests = Requests([client], options)
            await self._closed(requests, min(2.0, plan.phase_s))
            for number in range(plan.num_repeats):
                async with watching(client, self._pids) as watched:
                    capacity += await self._closed(requests, plan.phase_s)
                seen[0].append(watched)
                self._on_phase()
                per_s = OVERLOAD * _finished_per_s(capacity, plan.num_places)
                stop = asyncio.Event()
                async with watching(client, self._pids) as watched:
                    overload += (await asyncio.gather(requests.open(per_s, stop, number), after(plan.phase_s, stop)))[0]
                seen[1].append(watched)
                self._on_phase()
        total_s = plan.phase_s * plan.num_repeats
        return OverloadFigures(
            plan.num_places,
            round(_finished_per_s(capacity, plan.num_places), 2),
            _phase(capacity, seen[0], total_s),
            _phase(overload, seen[1], total_s),
        )

    async def _closed(self, requests: Requests, seconds: float) -> list[Answer]:
        stop = asyncio.Event()
        answers, _ = await asyncio.gather(requests.closed(self._plan.num_places, stop), after(seconds, stop))
        return answers


def _finished_per_s(answers: list[Answer], num_places: int) -> float:
    """By Little's law from how long a request takes: what began before the phase's end and ended behind it counts."""
    took_s = [answer.took_ms / 1e3 for answer in answers if answer.sample]
    return num_places * len(took_s) / sum(took_s) if took_s else 1.0


def _phase(answers: list[Answer], seen: list[Watched], seconds: float) -> Phase:
    refused = [a for a in answers if isinstance(a.error, ResourceExhausted)]
    delays_ms = [a.error.retry_after_ms for a in refused if a.error and a.error.retry_after_ms]
    others = reasons(a for a in answers if a.error and not isinstance(a.error, ResourceExhausted))
    finished = [a.sample for a in answers if a.sample]
    return Phase(
        offered_per_s=round(len(answers) / seconds, 2),
        num_requests=len(answers),
        num_finished=len(finished),
        num_refused=len(refused),
        num_refused_without_delay=len(refused) - len(delays_ms),
        other_errors=others,
        tpot_ms=tpot_of(answers),
        ttft_ms=Percentiles.of(s.ttft_ns / 1e6 for s in finished if s.ttft_ns is not None),
        refusal_ms=Percentiles.of(a.took_ms for a in refused),
        retry_delay_ms=Percentiles.of(delays_ms),
        max_running=max(w.max_running for w in seen),
        max_waiting=max(w.max_waiting for w in seen),
        max_target_queue=max(w.max_target_queue for w in seen),
        max_rss_mib={name: max(w.max_rss_mib[name] for w in seen) for name in SERVICES},
    )
