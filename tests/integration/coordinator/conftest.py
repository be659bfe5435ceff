"""A whole cluster inside the test's process: real servers on loopback, simulated models."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import coordinator_pb2_grpc, target_pb2

from services.common import rpc, rpc_errors
from services.common.tracing import NO_TRACER, Tracer
from services.common.worker_server import BuiltWorker, Recipe, RunningWorker, running_worker
from services.coordinator.config import CoordinatorConfig
from services.coordinator.server import RunningCoordinator, running_coordinator
from services.draft.config import DraftConfig
from services.draft.server import running_draft
from services.target.config import TargetConfig
from services.target.server import build as build_target
from services.target.server import running_target
from services.target.servicer import TargetServicer
from tests.fakes.ports import held_port

W = TypeVar("W", TargetConfig, DraftConfig)
TARGET = TargetConfig(host="127.0.0.1", port=0, model="simulated", simulated_step_ms=0.0)
DRAFT = DraftConfig(host="127.0.0.1", port=0, model="simulated", drafter="simulated", simulated_token_ms=0.0)


@dataclass(frozen=True, slots=True)
class Result:
    """All responses of a generation."""

    responses: list[pb.GenerateResponse]

    @property
    def started(self) -> pb.GenerationStarted:
        return next(response.started for response in self.responses if response.HasField("started"))

    @property
    def tokens(self) -> list[int]:
        return [token_id for response in self.responses for token_id in response.token_ids]

    @property
    def text(self) -> str:
        return "".join(response.text for response in self.responses)

    @property
    def finished(self) -> pb.GenerationFinished:
        return self.responses[-1].finished


@dataclass(frozen=True, slots=True)
class Cluster:
    """Running services and a stub."""

    coordinator: RunningCoordinator
    target: RunningWorker
    draft: RunningWorker | None
    stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub

    async def generate(self, **fields: Any) -> Result:
        """Runs a generation to its end; raises the error it ended with."""
        try:
            return Result([response async for response in self.stub.Generate(pb.GenerateRequest(**fields))])
        except grpc.aio.AioRpcError as error:
            raise rpc_errors.error_from_rpc(error) from error


UNHURRIED_MS = 60_000.0
"""For drafts of models whose steps are so short that a busy machine's pauses outlast them."""

StartCluster = Callable[..., contextlib.AbstractAsyncContextManager[Cluster]]


@pytest.fixture
def start_cluster(redis_url: str) -> StartCluster:
    """Starts a cluster: `start_cluster(target=..., draft=..., **coordinator settings)`; draft None: there is none."""

    @contextlib.asynccontextmanager
    async def start(
        target: TargetConfig = TARGET,
        draft: DraftConfig | None = DRAFT,
        tracers: Mapping[str, Tracer] = MappingProxyType({}),
        **settings: Any,
    ) -> AsyncIterator[Cluster]:
        async with contextlib.AsyncExitStack() as stack:
            target, draft = at_held_port(target, stack), draft and at_held_port(draft, stack)
            running_t = await stack.enter_async_context(running_target(target, tracer=tracers.get("target", NO_TRACER)))
            draft_tracer = tracers.get("draft", NO_TRACER)
            running_d = await stack.enter_async_context(running_draft(draft, tracer=draft_tracer)) if draft else None
            config = CoordinatorConfig(
                port=0,
                redis_url=redis_url,
                tokenizer="simulated",
                targets=f"127.0.0.1:{running_t.port}",
                drafts=f"127.0.0.1:{running_d.port}" if running_d else "",
            )
            tracer = tracers.get("coordinator", NO_TRACER)
            coordinator, stub = await stack.enter_async_context(
                coordinating(dataclasses.replace(config, **settings), tracer)
            )
            yield Cluster(coordinator, running_t, running_d, stub)

    return start


def at_held_port(config: W, stack: contextlib.AsyncExitStack) -> W:
    """At a port that stays a worker's when the worker has ended."""
    return dataclasses.replace(config, port=stack.enter_context(held_port()))


@dataclass(frozen=True, slots=True)
class ManyWorkers(Cluster):
    """A cluster of several targets and drafts; `target` and `draft` are the first ones."""

    targets: tuple[RunningWorker, ...]
    drafts: tuple[RunningWorker, ...]

    @property
    def workers(self) -> tuple[RunningWorker, ...]:
        return (*self.targets, *self.drafts)


StartMany = Callable[..., contextlib.AbstractAsyncContextManager[ManyWorkers]]


@pytest.fixture
def start_many(redis_url: str) -> StartMany:
    """Starts a cluster: `start_many(targets, drafts, **coordinator settings)`, of configurations or Models."""

    @contextlib.asynccontextmanager
    async def start(
        targets: Sequence[TargetConfig | Model], drafts: Sequence[DraftConfig], /, **settings: Any
    ) -> AsyncIterator[ManyWorkers]:
        async with contextlib.AsyncExitStack() as stack:
            running_t = [await stack.enter_async_context(start_target(target)) for target in targets]
            running_d = [await stack.enter_async_context(running_draft(draft)) for draft in drafts]
            config = CoordinatorConfig(
                port=0,
                redis_url=redis_url,
                tokenizer="simulated",
                targets=",".join(f"127.0.0.1:{target.port}" for target in running_t),
                drafts=",".join(f"127.0.0.1:{draft.port}" for draft in running_d),
            )
            config = dataclasses.replace(config, **settings)
            coordinator, stub = await stack.enter_async_context(coordinating(config))
            yield ManyWorkers(
                coordinator,
                running_t[0],
                running_d[0] if running_d else None,
                stub,
                targets=tuple(running_t),
                drafts=tuple(running_d),
            )

    return start


@dataclass(frozen=True, slots=True)
class Model:
    """A target that tells of itself otherwise: `changes` are those of its ModelInfo, and of its noise_version."""

    config: TargetConfig
    changes: dict[str, Any]


def start_target(target: TargetConfig | Model) -> contextlib.AbstractAsyncContextManager[RunningWorker]:
    if isinstance(target, TargetConfig):
        return running_target(target)
    config, changes = target.config, dict(target.changes)
    noise = {name: changes.pop(name) for name in ("noise_version",) if name in changes}

    def build() -> BuiltWorker:
        built = build_target(config)
        assert built.info.model is not None
        return built._replace(
            info=dataclasses.replace(built.info, model=dataclasses.replace(built.info.model, **changes), **noise)
        )

    service = target_pb2.DESCRIPTOR.services_by_name["TargetService"]
    return running_worker(config, Recipe("target", service, TargetServicer, build))


@contextlib.asynccontextmanager
async def coordinating(
    config: CoordinatorConfig,
    tracer: Tracer = NO_TRACER,
) -> AsyncIterator[tuple[RunningCoordinator, coordinator_pb2_grpc.CoordinatorServiceAsyncStub]]:
    """A coordinator that is ready, and a stub."""
    async with running_coordinator(config, tracer=tracer) as coordinator:
        assert await coordinator.wait_ready(10)
        options = rpc.channel_options(rpc.MAX_PUBLIC_MESSAGE_BYTES)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{coordinator.port}", options=options) as channel:
            yield coordinator, coordinator_pb2_grpc.CoordinatorServiceStub(channel)


@dataclass(frozen=True, slots=True)
class Node:
    """One of several coordinators."""

    running: RunningCoordinator
    stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub

    @property
    def port(self) -> int:
        return self.running.port


@contextlib.asynccontextmanager
async def node(workers: Cluster | tuple[int, int], redis_url: str, **settings: Any) -> AsyncIterator[Node]:
    """One more coordinator over the same workers, given by a cluster or by their ports."""
    if isinstance(workers, Cluster):
        workers = workers.target.port, workers.draft.port if workers.draft else 0
    config = CoordinatorConfig(
        port=0,
        redis_url=redis_url,
        tokenizer="simulated",
        targets=f"127.0.0.1:{workers[0]}",
        drafts=f"127.0.0.1:{workers[1]}" if workers[1] else "",
    )
    async with running_coordinator(dataclasses.replace(config, **settings)) as running:
        assert await running.wait_ready(10)
        options = rpc.channel_options(rpc.MAX_PUBLIC_MESSAGE_BYTES)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}", options=options) as channel:
            yield Node(running, coordinator_pb2_grpc.CoordinatorServiceStub(channel))


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> AsyncIterator[Cluster]:
    async with start_cluster() as running:
        yield running
