"""Clients that do not read, beside clients that do.

Owns: both kinds of client, and the comparison. Must not know: how it is shown.

Who does not read asks gRPC for a small window, so that little is under way when it stops: what is under way lies with
the client, and bounds nothing of the service. All of them begin together. As long as their windows and the
coordinator's limit have room, they are generations as any other; once no token is generated for them any more, the
others begin, and are measured until the coordinator has ended the last one of those who do not read. These then read
what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
from outrider.v1 import coordinator_pb2, coordinator_pb2_grpc

from bench.goals import Goal, ratio
from bench.load.cluster import COORDINATOR, LoadCluster, simulated
from bench.load.requests import NO_RETRY, Answer, Requests, reasons, tpot_of
from bench.load.watch import Watched, watching
from services.cli.bench.report import Percentiles
from services.client import GenerateOptions, OutriderClient
from services.common.errors import Aborted
from services.common.rpc import MAX_PUBLIC_MESSAGE_BYTES, channel_options
from services.common.rpc_errors import error_from_rpc

MAX_TPOT_RATIO = 1.1
SLOW_CLIENT = "SLOW_CLIENT"
_WINDOW_BYTES = 1024
_POLL_S = 0.2
_READING_S = 10.0
_ROUNDS = 8
"""In which something would have been generated for who is not stalled."""
_MAX_FILLING_S = 60.0
"""What unread tokens may take to gather."""
_NEVER_ENDING = 30_000
_CHANNEL_SIZE = 50
"""Calls of those who do not read on one channel."""


@dataclass(frozen=True, slots=True)
class SlowPlan:
    """`slow_client_s` and `max_unread_tokens` are the coordinator's settings."""

    num_slow: int = 200
    num_others: int = 32
    num_tokens: int = 64
    num_repeats: int = 2
    slow_client_s: float = 25.0
    max_unread_tokens: int = 256
    step_ms: float = 90.0
    token_ms: float = 2.0


@dataclass(frozen=True, slots=True)
class SlowFigures:
    """`alone`: the others by themselves; `beside`: while the slow ones are stalled."""

    num_slow: int
    num_others: int
    alone_tpot_ms: Percentiles
    beside_tpot_ms: Percentiles
    num_requests: tuple[int, int]
    other_errors: dict[str, int]
    slow_ends: dict[str, int]
    """By reason."""
    max_unread_tokens: int
    most_tokens_of_slow: int
    """That one of them was sent, in its window and before."""
    max_rss_mib: tuple[dict[str, float], dict[str, float]]

    @property
    def goals(self) -> tuple[Goal, ...]:
        num_ended = sum(self.slow_ends.values())
        return (
            Goal(
                "others: p99 TPOT over that without non-readers",
                ratio(self.beside_tpot_ms.p99, self.alone_tpot_ms.p99),
                MAX_TPOT_RATIO,
            ),
            Goal("others: errors", sum(self.other_errors.values()), 0),
            Goal(
                "non-readers that ended ABORTED/SLOW_CLIENT, share",
                ratio(self.slow_ends.get(SLOW_CLIENT, 0), num_ended),
                least=1,
            ),
            Goal("non-readers that ended", num_ended, least=self.num_slow),
        )


def measure(plan: SlowPlan, on_phase: Callable[[], None] = lambda: None) -> SlowFigures:
    """Starts a cluster; `on_phase` is called after each of 2 * num_repeats phases."""
    coordinator = ["--slow-client-s", str(plan.slow_client_s), "--max-unread-tokens", str(plan.max_unread_tokens)]
    coordinator += ["--max-generations", str(plan.num_slow + plan.num_others + 8)]
    spec = simulated(plan.step_ms, plan.token_ms, max_sequences=plan.num_slow + plan.num_others + 8)
    with LoadCluster(spec, {COORDINATOR: coordinator}) as cluster:
        return asyncio.run(_Runner(plan, cluster, on_phase).run())


class _Runner:
    def __init__(self, plan: SlowPlan, cluster: LoadCluster, on_phase: Callable[[], None]) -> None:
        self._plan = plan
        self._address = cluster.address
        self._pids = {name: cluster.pid_of(name) for name in (COORDINATOR, "target", "draft")}
        self._on_phase = on_phase
        self._slow_ends: Counter[str] = Counter()
        self._most_tokens = 0

    async def run(self) -> SlowFigures:
        plan = self._plan
        options = GenerateOptions(max_tokens=plan.num_tokens, temperature=0.0, ignore_eos=True)
        answers: tuple[list[Answer], list[Answer]] = ([], [])
        seen: tuple[list[Watched], list[Watched]] = ([], [])
        async with OutriderClient(self._address, retry=NO_RETRY) as client:
            requests = Requests([client], options)
            await self._others(requests, asyncio.sleep(min(2.0, plan.slow_client_s)))
            for _ in range(plan.num_repeats):
                for number, phase in enumerate((self._alone, self._beside)):
                    async with watching(client, self._pids) as watched:
                        answers[number].extend(await phase(client, requests))
                    seen[number].append(watched)
                    self._on_phase()
        rss = [{name: max(w.max_rss_mib[name] for w in of) for name in self._pids} for of in seen]
        errors = reasons(answer for answer in [*answers[0], *answers[1]] if answer.error)
        return SlowFigures(
            num_slow=plan.num_slow,
            num_others=plan.num_others,
            alone_tpot_ms=tpot_of(answers[0]),
            beside_tpot_ms=tpot_of(answers[1]),
            num_requests=(len(answers[0]), len(answers[1])),
            other_errors=errors,
            slow_ends=dict(self._slow_ends),
            max_unread_tokens=plan.max_unread_tokens,
            most_tokens_of_slow=self._most_tokens,
            max_rss_mib=(rss[0], rss[1]),
        )

    async def _others(self, requests: Requests, until: Awaitable[object]) -> list[Answer]:
        """What they were answered before `until` was over."""
        stop = asyncio.Event()

        async def stopping() -> float:
            await until
            stop.set()
            return time.perf_counter()

        answers, ended_s = await asyncio.gather(requests.closed(self._plan.num_others, stop), stopping())
        return [answer for answer in answers if answer.started_s + answer.took_ms / 1e3 <= ended_s]

    async def _alone(self, client: OutriderClient, requests: Requests) -> list[Answer]:
        return await self._others(requests, asyncio.sleep(self._plan.slow_client_s))

    async def _beside(self, client: OutriderClient, requests: Requests) -> list[Answer]:
        options = [*channel_options(MAX_PUBLIC_MESSAGE_BYTES)]
        options += [("grpc.http2.lookahead_bytes", _WINDOW_BYTES), ("grpc.http2.bdp_probe", 0)]
        async with contextlib.AsyncExitStack() as stack:
            calls = []
            for begin in range(0, self._plan.num_slow, _CHANNEL_SIZE):
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(self._address, options=options))
                stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
                for number in range(begin, min(begin + _CHANNEL_SIZE, self._plan.num_slow)):
                    calls.append(stub.Generate(_request(number)))
            await asyncio.gather(*[call.read() for call in calls])
            await self._until_stalled(client)
            answers = await self._others(requests, self._until_ended(client))
            await asyncio.gather(*[self._read_rest(call) for call in calls])
        return answers

    async def _until_stalled(self, client: OutriderClient) -> None:
        """Until no token has been generated for a while."""
        deadline_s, before = time.perf_counter() + _MAX_FILLING_S, -1
        while time.perf_counter() < deadline_s:
            now = (await client.get_cluster_status()).activity.num_generated_tokens
            if now == before:
                return
            before = now
            await asyncio.sleep(_ROUNDS * (self._plan.step_ms + 4 * self._plan.token_ms) / 1e3)

    async def _until_ended(self, client: OutriderClient) -> None:
        """Until the coordinator has ended all but the others' generations, or should have."""
        deadline_s = time.perf_counter() + 2 * self._plan.slow_client_s
        while time.perf_counter() < deadline_s:
            await asyncio.sleep(_POLL_S)
            status = await client.get_cluster_status()
            if status.num_requests_running + status.num_requests_waiting <= self._plan.num_others:
                return

    async def _read_rest(self, call: Any) -> None:
        num_tokens, reason = 0, "ok"
        try:
            async with asyncio.timeout(_READING_S):
                while (response := await call.read()) is not grpc.aio.EOF:
                    num_tokens += len(response.token_ids)
        except TimeoutError:
            reason = "none"  # it runs on
        except grpc.aio.AioRpcError as failure:
            error = error_from_rpc(failure)
            reason = error.reason if isinstance(error, Aborted) else type(error).__name__
        self._slow_ends[reason] += 1
        self._most_tokens = max(self._most_tokens, num_tokens)


def _request(number: int) -> coordinator_pb2.GenerateRequest:
    prompt = f"{number} does not read"
    return coordinator_pb2.GenerateRequest(prompt=prompt, max_tokens=_NEVER_ENDING, ignore_eos=True)
