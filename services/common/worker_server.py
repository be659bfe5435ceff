"""The composition that both kinds of worker share: a gRPC server at once, then the engine, in the end draining.

Owns: the order of these. Must not know: how an engine is built (a function is given), torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

from google.protobuf.descriptor import ServiceDescriptor
from outrider.v1 import worker_pb2
from prometheus_client import CollectorRegistry

from services.common.failure import Failure
from services.common.metrics import metrics_endpoint, new_registry
from services.common.open_tracer import open_tracer
from services.common.peer_names import PeerNames
from services.common.rpc import GrpcServer, ServerLimits
from services.common.service import announce_ready, exit_on_signals, stop_signals, wait_until
from services.common.tally import CallTally, Watched
from services.common.telemetry_settings import METRICS_OFF
from services.common.time_slices import short_slices
from services.common.tls import server_credentials
from services.common.tracing import NO_TRACER, Tracer
from services.common.values import WorkerInfo
from services.common.worker import Engine, Worker, WorkerServicer, WorkerState
from services.common.worker_config import WorkerConfig
from services.common.worker_metrics import WorkerCollector

T = TypeVar("T")
log = logging.getLogger(__name__)

_WORKER_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
_DRAIN_INTERVAL_S = 0.05


class StartableEngine(Engine, Protocol):
    """An engine with a life: services.engine.engine_thread.EngineThread."""

    def start(self) -> None: ...

    def stop(self) -> bool: ...

    def drain(self, timeout_s: float) -> None: ...

    @property
    def failure(self) -> Failure: ...


def nothing_to_close() -> None:
    """For engines without processes of their own."""


class BuiltWorker(NamedTuple):
    """What building gives: an engine that is not started yet, and its description."""

    engine: StartableEngine
    info: WorkerInfo
    watched: Watched
    close: Callable[[], None] = nothing_to_close
    """Ends what the engine stands on; called once, after the engine has stopped."""


class Recipe(NamedTuple):
    """What tells one kind of worker from the other."""

    role: str
    service: ServiceDescriptor
    servicer: Callable[[WorkerState], object]
    build: Callable[[], BuiltWorker]
    """Called once, on a thread: may take long."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunningWorker:
    """A worker that serves."""

    port: int
    worker: Worker
    server: GrpcServer
    engine: StartableEngine
    registry: CollectorRegistry
    metrics_port: int

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new sequences; returns whether those that are open ended within `timeout_s`."""
        until = time.monotonic() + timeout_s
        await self.server.set_ready(False)
        try:
            await asyncio.to_thread(self.engine.drain, timeout_s)
        except TimeoutError:  # a step that does not end
            return self.engine.load.num_sequences == 0
        left_s = until - time.monotonic()
        return await wait_until(lambda: self.engine.load.num_sequences == 0, left_s, _DRAIN_INTERVAL_S)


def new_instance_id() -> str:
    """Drawn at start, so that a restarted worker under the same address is told from the old one."""
    return str(uuid.uuid4())


@contextlib.asynccontextmanager
async def running_worker(
    config: WorkerConfig, recipe: Recipe, metrics_port: int = METRICS_OFF, tracer: Tracer = NO_TRACER
) -> AsyncIterator[RunningWorker]:
    """Serves from enter to exit. Until the engine is built, calls are answered UNAVAILABLE/STARTING."""
    started = time.monotonic()
    state, calls, collector = WorkerState(tracer), CallTally(), WorkerCollector(recipe.role)
    registry = new_registry(calls, {"role": recipe.role})
    registry.register(collector)
    server = _server(config, calls)
    server.add(_WORKER_SERVICE, WorkerServicer(state))
    server.add(recipe.service, recipe.servicer(state))
    with metrics_endpoint(config.host, metrics_port, registry) as bound_metrics_port:
        async with server:
            engine, info, watched, close = await _in_passing_thread(recipe.build)
            engine.start()
            with short_slices():
                try:
                    startup_ms = 1e3 * (time.monotonic() - started)
                    worker = Worker(engine, dataclasses.replace(info, startup_ms=startup_ms), watched.activity)
                    collector.set_ready(info, watched, lambda: engine.load)
                    state.set_ready(worker)
                    await server.set_ready(True)
                    yield RunningWorker(server.port, worker, server, engine, registry, bound_metrics_port)
                finally:
                    await server.set_ready(False)
                    await asyncio.to_thread(engine.stop)
                    await asyncio.to_thread(close)


async def _in_passing_thread(function: Callable[[], T]) -> T:
    """Calls it in a thread that ends with it, and OpenMP's threads with that one: where a process has more of them than
    cores, GNU's runtime lets all sleep after each product, and a step takes twice as long."""
    with ThreadPoolExecutor(1) as executor:
        return await asyncio.get_running_loop().run_in_executor(executor, function)


def _server(config: WorkerConfig, calls: CallTally) -> GrpcServer:
    """With TLS, coordinators alone may call it. Raises ConfigError for bad TLS files."""
    tls = config.load_tls()
    return GrpcServer(
        config.host,
        config.port,
        limits=ServerLimits(max_connections=config.max_connections),
        credentials=server_credentials(tls) if tls else None,
        interceptors=[PeerNames(config.coordinator_names)] if tls else [],
        probe_port=config.probe_port_number,
        reflect=config.reflection,
        calls=calls,
    )


async def serve_worker(config: WorkerConfig, recipe: Recipe) -> None:
    """Serves until SIGTERM or SIGINT, then drains; while the engine is being built, either ends the process at once.

    Raises WorkerFailed once the engine cannot go on.
    """
    async with contextlib.AsyncExitStack() as stack:
        tracer = stack.enter_context(open_tracer(config.trace_endpoint, 0.0, recipe.role))
        with exit_on_signals():
            worker = running_worker(config, recipe, config.metrics_port, tracer)
            running = await stack.enter_async_context(worker)
        with stop_signals() as stop:
            info = running.worker.info
            announce_ready(info.role, running.port, instance_id=info.instance_id, metrics_port=running.metrics_port)
            log.info("%s %s serves on port %d", info.role, info.instance_id, running.port)
            await _stopped(stop, running.engine.failure)
            if not await running.drain(config.drain_s):
                log.warning("%d sequences were open after %g s", running.engine.load.num_sequences, config.drain_s)


async def _stopped(stop: asyncio.Event, failure: Failure) -> None:
    """Returns once `stop` is set. Raises the failure if there is one before that."""
    stopping, failing = asyncio.ensure_future(stop.wait()), asyncio.ensure_future(failure.wait())
    await asyncio.wait((stopping, failing), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if failing.done():
        raise failing.result()
    failing.cancel()
