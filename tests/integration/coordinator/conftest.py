"""A whole cluster inside the test's process: real servers on loopback, simulated models."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import coordinator_pb2_grpc

from services.common import rpc
from services.common.tracing import NO_TRACER, Tracer
from services.common.worker_server import RunningWorker
from services.coordinator.config import CoordinatorConfig
from services.coordinator.server import RunningCoordinator, running_coordinator
from services.draft.config import DraftConfig
from services.draft.server import running_draft
from services.target.config import TargetConfig
from services.target.server import running_target

TARGET = TargetConfig(host="127.0.0.1", port=0, model="simulated", simulated_step_ms=0.0)
DRAFT = DraftConfig(host="127.0.0.1", port=0, model="simulated", drafter="simulated", simulated_token_ms=0.0)


@dataclass(frozen=True, slots=True)
class Result:
    """All responses of a generation."""

    responses: list[pb.GenerateResponse]

    @property
    def started(self) -> pb.GenerationStarted:
        return self.responses[0].started

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
            raise rpc.error_from_rpc(error) from error


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
            running_c = running_coordinator(dataclasses.replace(config, **settings), tracer=tracer)
            coordinator = await stack.enter_async_context(running_c)
            assert await coordinator.wait_ready(10)
            options = rpc.channel_options(rpc.MAX_PUBLIC_MESSAGE_BYTES)
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(f"127.0.0.1:{coordinator.port}", options=options)
            )
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            yield Cluster(coordinator, running_t, running_d, stub)

    return start


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> AsyncIterator[Cluster]:
    async with start_cluster() as running:
        yield running
