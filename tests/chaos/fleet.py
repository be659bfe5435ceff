"""The system under test: coordinators, drafts, targets and a Redis as processes, each behind proxies.

Owns: which parts there are, their addresses, and asking them how they are. Must not know: faults, requests.

    client ──▶ proxy ──▶ coordinator ──▶ proxy ──▶ target, draft
                              └────────▶ proxy (one for each coordinator) ──▶ Redis
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc.aio
from outrider.v1 import coordinator_pb2, coordinator_pb2_grpc, worker_pb2, worker_pb2_grpc
from redis import Redis
from redis.exceptions import RedisError

from services.cli.cluster import (
    SIMULATED,
    ClusterSpec,
    PreparedModel,
    child_environment,
    coordinator_flags,
    draft_flags,
    prepare_model,
    prepare_pool,
    redis_binary,
    target_flags,
)
from tests.chaos.faults import Role
from tests.chaos.parts import Part, PartProcess
from tests.fakes.ports import held_port
from tests.fakes.tcp_proxy import TcpProxy

_NUM_EACH = 3
_ASK_S = 2.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """What to start. `outage_after_s` is the coordinators' --redis-outage-after-s."""

    cluster: ClusterSpec
    target_timeout_s: float = 2.0
    outage_after_s: float = 1.0
    num_blocks: int = 1024
    threads: int = 1


class Standing(NamedTuple):
    """How a part is: its instance, the generations at it, those that are being opened and those that have no token yet
    included, blocks of its KV pool in use. Nothing if it is silent."""

    instance_id: str
    num_in_flight: int
    num_blocks: int

    @property
    def num_held(self) -> int:
        """What should be 0 where nothing is asked; silence is not."""
        return self.num_in_flight + self.num_blocks + (not self.instance_id)


class Fleet:
    """All parts."""

    def __init__(self, parts: list[Part], redis_port: int, tokenizer: str) -> None:
        """`tokenizer`: the target's, `simulated` or its directory."""
        self.parts, self.redis_port, self.tokenizer = parts, redis_port, tokenizer

    def of(self, role: Role) -> list[Part]:
        return [part for part in self.parts if part.role is role]

    @property
    def addresses(self) -> list[str]:
        """Of the coordinators, as clients know them."""
        return [part.proxies[0].address for part in self.of(Role.COORDINATOR)]

    async def ask(self, part: Part) -> Standing:
        """Past the proxies. Of Redis: the coordinators together."""
        if part.role is Role.REDIS:
            all_of_them = await asyncio.gather(*map(self.ask, self.of(Role.COORDINATOR)))
            return Standing("", sum(standing.num_in_flight for standing in all_of_them), 0)
        try:
            async with grpc.aio.insecure_channel(part.direct_address) as channel:
                return await (_ask_coordinator if part.role is Role.COORDINATOR else _ask_worker)(channel)
        except grpc.aio.AioRpcError:
            return Standing("", 0, 0)

    async def wait_idle(self, timeout_s: float) -> dict[str, int]:
        """Waits until no worker holds blocks or sequences and no coordinator a generation; what is left by then."""
        deadline = time.monotonic() + timeout_s
        while True:
            asked = [(part.name, await self.ask(part)) for part in self.parts if part.role is not Role.REDIS]
            left = {name: standing.num_held for name, standing in asked if standing.num_held}
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(_POLL_S)


async def _ask_coordinator(channel: grpc.aio.Channel) -> Standing:
    stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
    status = await stub.GetClusterStatus(coordinator_pb2.GetClusterStatusRequest(), timeout=_ASK_S)
    return standing_of(status)


def standing_of(status: coordinator_pb2.GetClusterStatusResponse) -> Standing:
    """A coordinator's. A generation that has not emitted yet may have to be given back as well."""
    return Standing(status.instance_id, status.num_requests_running + status.num_requests_waiting, 0)


async def _ask_worker(channel: grpc.aio.Channel) -> Standing:
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    info = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=_ASK_S)
    return Standing(info.instance_id, info.load.num_sequences, info.load.num_used_blocks)


@contextlib.asynccontextmanager
async def running_fleet(spec: FleetSpec, directory: Path) -> AsyncIterator[Fleet]:
    """From enter to exit. The logs stay in `directory`."""
    target = prepare_model(spec.cluster.target)
    draft = prepare_pool(spec.cluster.pools[0], target)
    async with contextlib.AsyncExitStack() as stack:
        build = _Builder(spec, directory, child_environment(spec.threads), target, draft, stack)
        redis, targets, drafts = build.redis(), build.workers(Role.TARGET), build.workers(Role.DRAFT)
        await _start_proxies(stack, [redis, *targets, *drafts])
        coordinators = [build.coordinator(i, redis, targets, drafts) for i in range(_NUM_EACH)]
        await _start_proxies(stack, coordinators)
        for group in ([redis], [*targets, *drafts], coordinators):
            for part in group:
                stack.push_async_callback(part.kill)
            await asyncio.gather(*(part.start() for part in group))
        yield Fleet([*coordinators, *drafts, *targets, redis], redis.port, target.directory)


async def _start_proxies(stack: contextlib.AsyncExitStack, parts: list[Part]) -> None:
    for proxy in (proxy for part in parts for proxy in part.proxies):
        await proxy.start()
        stack.push_async_callback(proxy.aclose)


@dataclass(frozen=True, slots=True)
class _Builder:
    """Parts and their command lines."""

    spec: FleetSpec
    directory: Path
    env: Mapping[str, str]
    target: PreparedModel
    draft: tuple[PreparedModel | None, str]
    """Its model, if it has one, and the target's tokenizer where it needs that."""
    stack: contextlib.AsyncExitStack

    def redis(self) -> Part:
        """With its data on disk, so that it comes back with it."""
        port, data = self._port(), self.directory / "redis"
        data.mkdir()
        command = [redis_binary(), "--port", str(port), "--dir", str(data), "--save", "", "--maxmemory-policy"]
        command += ["noeviction", "--appendonly", "yes", "--appendfsync", "everysec"]

        def answers() -> bool:
            with contextlib.suppress(RedisError, OSError), Redis(port=port, socket_timeout=1.0) as client:
                return bool(client.ping())
            return False

        process = PartProcess("redis", command, self.directory, self.env, answers)
        proxies = [TcpProxy("127.0.0.1", port) for _ in range(_NUM_EACH)]
        return Part("redis", Role.REDIS, port, process, proxies, data / "appendonlydir")

    def workers(self, role: Role) -> list[Part]:
        return [self._worker(role, f"{role.value}-{i}", self._port()) for i in range(1, _NUM_EACH + 1)]

    def _worker(self, role: Role, name: str, port: int) -> Part:
        cluster = dataclasses.replace(self.spec.cluster, target_port=port, draft_port=port)
        if role is Role.TARGET:
            flags = target_flags(cluster, self.target, self.spec.threads)
        else:
            model, tokenizer = self.draft
            flags = draft_flags(cluster, model, self.spec.threads, self.target.directory, tokenizer)
        if cluster.target == SIMULATED:
            flags += ["--num-blocks", str(self.spec.num_blocks)]
        return self._service(name, role, port, flags)

    def coordinator(self, index: int, redis: Part, targets: list[Part], drafts: list[Part]) -> Part:
        port = self._port()
        cluster = dataclasses.replace(self.spec.cluster, coordinator_port=port)
        workers = [",".join(worker.proxies[0].address for worker in group) for group in (targets, drafts)]
        redis_url = f"redis://{redis.proxies[index].address}/0"
        flags = coordinator_flags(cluster, self.target.directory, redis_url, *workers)
        flags += ["--target-timeout-s", str(self.spec.target_timeout_s)]
        flags += ["--redis-outage-after-s", str(self.spec.outage_after_s)]
        return self._service(f"coordinator-{index + 1}", Role.COORDINATOR, port, flags)

    def _port(self) -> int:
        """Held while the fleet runs."""
        return self.stack.enter_context(held_port())

    def _service(self, name: str, role: Role, port: int, flags: list[str]) -> Part:
        command = [sys.executable, "-P", "-m", f"services.{role.value}", *flags]
        process = PartProcess(name, command, self.directory, self.env)
        return Part(name, role, port, process, [TcpProxy("127.0.0.1", port)])
