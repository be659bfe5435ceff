"""The chart's workloads as processes: announced as pods are, and replaced in the order of the chart's controllers.

Owns: the processes, their EndpointSlices and the coordinators' addresses, and what goes first when one is replaced.
Must not know: who asks the service, or what is expected of it.

    coordinators   Deployment, maxSurge 1       the new one first, then the old one is told to stop
    targets        StatefulSet                  from the highest number down: the old one has to end first
    draft          Deployment, maxSurge 0       the old one has to end first; there is no other
    Redis          StatefulSet, with a volume   the old one has to end first; the new one has its data and address

Before SIGTERM a pod leaves the endpoints and waits `preStopSeconds`; here it waits until it has to wait no longer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import tenacity

from services.client import OutriderClient
from services.common.errors import OutriderError
from tests.fakes.kubernetes_api import KubernetesApi, endpoint_slice
from tests.fakes.ports import held_port
from tests.fakes.redis_process import RedisProcess
from tests.fakes.redis_process import running as running_redis
from tests.fakes.service_process import ServiceProcess, Version, service_process
from tests.fakes.tcp_proxy import TcpProxy, proxied

TARGETS, DRAFT, COORDINATORS = ("target-1", "target-0"), "draft-0", ("coordinator-0", "coordinator-1")
_KEEPS_ADDRESS = "target-1"
"""A pod of a StatefulSet keeps its name; its address only in some networks."""
_PRE_STOP_S = 5.0
_START_S = 20.0
_POLL_S = 0.05
_REDIS_FLAGS = ("--appendonly", "yes", "--appendfsync", "everysec")
_FLAGS = {
    "target": ("--model", "simulated", "--simulated-step-ms", "8"),
    "draft": ("--model", "simulated", "--drafter", "simulated", "--simulated-token-ms", "0.5"),
    "coordinator": (
        *("--tokenizer", "simulated", "--insecure", "--drain-s", "0.2"),
        *("--targets", "kubernetes://ns/targets:grpc", "--drafts", "kubernetes://ns/drafts:grpc"),
    ),
}


class Deployment:
    """What `deployed` has started."""

    def __init__(
        self, api: KubernetesApi, config: Path, redis: RedisProcess, version: Version, stack: contextlib.AsyncExitStack
    ) -> None:
        self.version = version
        """Of the services that start from now on."""
        self._api, self._config, self._redis, self._stack = api, config, redis, stack
        self._ports = {_KEEPS_ADDRESS: stack.enter_context(held_port())}
        self._parts: dict[str, ServiceProcess] = {}
        self._proxies: dict[str, TcpProxy] = {}

    @property
    def addresses(self) -> list[str]:
        """Of the coordinators; they stay."""
        return [proxy.address for proxy in self._proxies.values()]

    async def start(self) -> None:
        await asyncio.gather(*(self._start_worker(name) for name in (*TARGETS, DRAFT)))
        for name in COORDINATORS:
            part = self._parts[name] = await self._start(name)
            self._proxies[name] = await self._stack.enter_async_context(proxied("127.0.0.1", part.port))

    async def replacing(self, role: str) -> AsyncIterator[str]:
        """Replaces all of that role; stops whenever something has changed, and says what."""
        if role == "target":
            for name in TARGETS:
                others = [other for other in TARGETS if other != name]
                await self._stop_worker(name, others)
                yield f"without {name}"
                await self._start_worker(name)
                yield f"with a new {name}"  # it is ready, and so the next one may go, whoever knows this one
        elif role == "draft":
            await self._stop_worker(DRAFT, [])
            yield "without a draft"
            await self._start_worker(DRAFT)
            await self._known(DRAFT, within_s=_START_S)
            yield "with a new draft"
        elif role == "redis":
            await asyncio.to_thread(self._redis.terminate)
            yield "without Redis"
            await asyncio.to_thread(self._redis.start)
            yield "with Redis again"
        else:
            for name in COORDINATORS:
                await self._replace_coordinator(name)
                yield f"with a new {name}"

    async def _replace_coordinator(self, name: str) -> None:
        """Who connects anew comes to the new one."""
        new = await self._start(name)
        self._proxies[name].target = "127.0.0.1", new.port
        old, self._parts[name] = self._parts[name], new
        assert await old.terminate() == 0

    async def _stop_worker(self, name: str, others: list[str]) -> None:
        """Told to stop once the coordinators know the others of its kind, or preStop is over."""
        self._announce(name, ready=False, serving=True, terminating=True)
        with contextlib.suppress(tenacity.RetryError):
            await self._known(*others, within_s=_PRE_STOP_S)
        assert await self._parts[name].terminate() == 0
        self._api.delete(name)

    async def _start_worker(self, name: str) -> None:
        self._parts[name] = await self._start(name)
        self._announce(name)

    async def _start(self, name: str) -> ServiceProcess:
        role = name.partition("-")[0]
        environment = {"KUBECONFIG": str(self._config), "OUTRIDER_REDIS_URL": self._redis.url}
        process = service_process(
            f"services.{role}",
            *_FLAGS[role],
            version=self.version,
            port=self._ports.get(name, 0),
            **(environment if role == "coordinator" else {}),
        )
        return await self._stack.enter_async_context(process)

    def _announce(self, name: str, **conditions: Any) -> None:
        ports = [{"name": "grpc", "port": self._parts[name].port}]
        service = f"{name.partition('-')[0]}s"
        self._api.apply(endpoint_slice(name, "127.0.0.1", service=service, ports=ports, **conditions))

    async def _known(self, *workers: str, within_s: float) -> None:
        """Returns once every coordinator is connected to these workers. Raises tenacity.RetryError."""
        wanted = {self._parts[worker].address for worker in workers}
        until = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_delay(within_s),
            wait=tenacity.wait_fixed(_POLL_S),
            retry=tenacity.retry_if_result(lambda connected: not wanted <= connected),
        )
        await asyncio.gather(*(until(self._connected, name) for name in self._proxies))

    async def _connected(self, name: str) -> set[str]:
        """Addresses of the workers that a coordinator is connected to; none where it is being replaced, or too old to
        say."""
        async with OutriderClient(self._parts[name].address) as client:
            with contextlib.suppress(OutriderError):
                return {worker.address for worker in (await client.get_cluster_status()).workers if worker.up}
        return set()


@contextlib.asynccontextmanager
async def deployed(api: KubernetesApi, config: Path, data: Path, version: Version) -> AsyncIterator[Deployment]:
    """One draft, two targets, two coordinators and a Redis that keeps its data in `data`, from enter to exit."""
    async with contextlib.AsyncExitStack() as stack:
        redis = stack.enter_context(running_redis(data, *_REDIS_FLAGS))
        deployment = Deployment(api, config, redis, version, stack)
        await deployment.start()
        yield deployment
