"""Every part is replaced by one of another version under load, as a rolling update does it: nobody notices.

With OUTRIDER_PREDECESSOR, a checkout of an earlier version with its own stubs, also from that one. What was seen goes
into the file OUTRIDER_UPGRADE_RESULTS.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import coordinator_pb2_grpc

from services.cli.bench.machine import environment
from services.client import GenerateOptions, OutriderClient, Result
from services.common.service import wait_until
from tests.fakes.kubernetes_api import KubernetesApi, endpoint_slice, kubeconfig
from tests.fakes.service_process import PRESENT, ServiceProcess, Version, service_process
from tests.fakes.tcp_proxy import TcpProxy, proxied

NUM_CLIENTS = 4
OPTIONS = GenerateOptions(ignore_eos=True, temperature=1.0)


def num_tokens(seed: int) -> int:
    """One client's generations are long enough to be under way whatever is replaced."""
    return 800 if seed % NUM_CLIENTS == 0 else 60


WORKER_FLAGS = {
    "target": ("--model", "simulated", "--simulated-step-ms", "8"),
    "draft": ("--model", "simulated", "--drafter", "simulated", "--simulated-token-ms", "0.5"),
}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubernetesApi]:
    with KubernetesApi().serving() as api:
        (tmp_path / "config").write_text(kubeconfig(api.url))
        yield api


@dataclass
class Load:
    """Clients that generate without a pause; every result is kept."""

    client: OutriderClient
    results: list[tuple[int, Result]] = field(default_factory=list)
    stopped: bool = False

    async def run(self, seed: int) -> None:
        while not self.stopped:
            self.results.append((seed, await self.generate(self.client, seed)))
            seed += NUM_CLIENTS

    @staticmethod
    async def generate(client: OutriderClient, seed: int) -> Result:
        return await client.complete(f"Prompt {seed}", replace(OPTIONS, seed=seed, max_tokens=num_tokens(seed)))

    async def more(self) -> None:
        """Returns when some more generations have finished."""
        goal = len(self.results) + NUM_CLIENTS
        assert await wait_until(lambda: len(self.results) >= goal, 30)


class Deployment:
    """Processes by name, announced as pods are: workers in EndpointSlices, coordinators behind addresses that stay."""

    def __init__(
        self, api: KubernetesApi, config: Path, redis_url: str, version: Version, stack: contextlib.AsyncExitStack
    ) -> None:
        self.version = version
        """Of the processes that start from now on."""
        self._api = api
        self._stack = stack
        self._coordinator_flags = (
            *("--redis-url", redis_url, "--tokenizer", "simulated", "--insecure"),
            *("--targets", "kubernetes://ns/targets:grpc", "--drafts", "kubernetes://ns/drafts:grpc"),
        )
        self._config = config
        self.parts: dict[str, ServiceProcess] = {}
        self.addresses: dict[str, TcpProxy] = {}

    async def start_worker(self, role: str, name: str) -> None:
        self.parts[name] = await self._stack.enter_async_context(
            service_process(f"services.{role}", *WORKER_FLAGS[role], version=self.version)
        )
        self._announce(role, name)

    async def start_coordinator(self, name: str) -> ServiceProcess:
        process = service_process(
            "services.coordinator", *self._coordinator_flags, version=self.version, KUBECONFIG=str(self._config)
        )
        return await self._stack.enter_async_context(process)

    async def add_coordinator(self, name: str) -> None:
        self.parts[name] = part = await self.start_coordinator(name)
        self.addresses[name] = await self._stack.enter_async_context(proxied("127.0.0.1", part.port))

    def _announce(self, role: str, name: str, **conditions: bool) -> None:
        ports = [{"name": "grpc", "port": self.parts[name].port}]
        self._api.apply(endpoint_slice(name, "127.0.0.1", service=f"{role}s", ports=ports, **conditions))

    async def replace_worker(self, role: str, old: str, new: str) -> None:
        """The new one first; the old one is told to stop once every coordinator has the new one."""
        await self.start_worker(role, new)
        await self._connected(self.parts[new].address)
        self._announce(role, old, ready=False, serving=True, terminating=True)
        assert await self.parts.pop(old).terminate() == 0
        self._api.delete(old)

    async def replace_coordinator(self, name: str) -> None:
        """The same; who connects anew comes to the new one."""
        new = await self.start_coordinator(name)
        self.addresses[name].target = "127.0.0.1", new.port
        old, self.parts[name] = self.parts[name], new
        assert await old.terminate() == 0

    def replacing(self, role: str) -> Iterator[Awaitable[None]]:
        """One part of that role after the other."""
        if role == "coordinator":
            return (self.replace_coordinator(name) for name in self.addresses)
        return iter([self.replace_worker(role, f"{role}-0", f"{role}-1")])

    async def _connected(self, worker: str) -> None:
        for name in self.addresses:
            async with grpc.aio.insecure_channel(self.parts[name].address) as channel:
                stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
                async for status in _statuses(stub):
                    if any(other.address == worker and other.up for other in status.workers):
                        break


async def _statuses(
    stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub,
) -> AsyncIterator[pb.GetClusterStatusResponse]:
    """One after another, for 20 s at most."""
    async with asyncio.timeout(20):
        while True:
            yield await stub.GetClusterStatus(pb.GetClusterStatusRequest())
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def deployed(api: KubernetesApi, config: Path, redis_url: str, version: Version) -> AsyncIterator[Deployment]:
    async with contextlib.AsyncExitStack() as stack:
        deployment = Deployment(api, config, redis_url, version, stack)
        await deployment.start_worker("target", "target-0")
        await deployment.start_worker("draft", "draft-0")
        for name in ("coordinator-0", "coordinator-1"):
            await deployment.add_coordinator(name)
        yield deployment


ROLES, BACKWARDS = ("draft", "target", "coordinator"), ("coordinator", "target", "draft")
UPDATES = [(Version("predecessor"), PRESENT, BACKWARDS), (PRESENT, Version("successor"), ROLES)]
if "OUTRIDER_PREDECESSOR" in os.environ:
    tree = Path(os.environ["OUTRIDER_PREDECESSOR"])
    checkout = Version((tree / "COMMIT").read_text(), tree)
    UPDATES += [(checkout, PRESENT, ROLES), (checkout, PRESENT, BACKWARDS)]


def _case(before: Version, after: Version, order: tuple[str, ...]) -> Any:
    """In `make test` the first one alone; each takes half a minute."""
    marks = () if before.name == "predecessor" else pytest.mark.slow
    return pytest.param(before, after, order, id=f"{before.name} to {after.name}, {order[0]} first", marks=marks)


@pytest.mark.parametrize(("before", "after", "order"), [_case(*update) for update in UPDATES])
async def test_replacing_every_part_under_load_fails_no_request_and_changes_no_token(
    api: KubernetesApi,
    tmp_path: Path,
    redis_url: str,
    before: Version,
    after: Version,
    order: tuple[str, ...],
    request: pytest.FixtureRequest,
) -> None:
    async with deployed(api, tmp_path / "config", redis_url, before) as deployment:
        deployment.version = after
        addresses = [proxy.address for proxy in deployment.addresses.values()]
        async with OutriderClient(*addresses) as client:
            load = Load(client)
            clients = [asyncio.create_task(load.run(seed)) for seed in range(NUM_CLIENTS)]
            await load.more()
            for role in order:
                for replaced in deployment.replacing(role):
                    await replaced
                    await load.more()
            load.stopped = True
            await asyncio.gather(*clients)
            undisturbed = await asyncio.gather(*[Load.generate(client, seed) for seed, _ in load.results])
    assert len(load.results) >= 5 * NUM_CLIENTS
    assert [result.token_ids for _, result in load.results] == [result.token_ids for result in undisturbed]
    assert all(len(result.tokens) == num_tokens(seed) for seed, result in load.results)
    assert sum(result.statistics.num_accepted_tokens for _, result in load.results) > 0
    if results := os.environ.get("OUTRIDER_UPGRADE_RESULTS"):
        record(Path(results), request.node.callspec.id, [result for _, result in load.results])


def record(path: Path, update: str, results: list[Result]) -> None:
    """Beside what other updates left in the file."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[update] = {
        "generations": len(results),
        "tokens": sum(len(result.tokens) for result in results),
        "resumed_generations": sum(result.num_resumptions > 0 for result in results),
        "environment": dataclasses.asdict(environment([])) | {"command": "make check-upgrade"},
    }
    path.write_text(json.dumps(known, indent=2) + "\n")
