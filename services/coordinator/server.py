"""The coordinator's composition root: configuration in, a serving coordinator out.

Owns: which parts there are and the order of their lives. Must not know: what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tenacity
from outrider.v1 import coordinator_pb2
from prometheus_client import CollectorRegistry

from services.common.addresses import is_loopback
from services.common.api_keys import KeyFile
from services.common.channels import Channels
from services.common.errors import Unavailable
from services.common.metrics import metrics_endpoint, new_registry
from services.common.open_tracer import open_tracer
from services.common.quota_ledger import QuotaLedger
from services.common.rpc import MAX_PUBLIC_MESSAGE_BYTES, GrpcServer, ServerLimits
from services.common.service import announce_ready, stop_signals
from services.common.session_store import SessionStore
from services.common.session_usage import Caps, SessionUsage
from services.common.tally import CallTally
from services.common.telemetry_settings import METRICS_OFF
from services.common.time_slices import short_slices
from services.common.tls import server_credentials
from services.common.tracing import NO_TRACER, Tracer
from services.coordinator.authentication import ApiKeys, Authenticator
from services.coordinator.committer import Committer, Outage
from services.coordinator.config import CoordinatorConfig
from services.coordinator.coordinator import Coordinator
from services.coordinator.discovery import Source
from services.coordinator.draft_pools import DraftPool
from services.coordinator.metrics import EXPECTED_CALLS, CoordinatorCollector
from services.coordinator.open_calls import SPARE_CALLS, OpenCalls
from services.coordinator.placement import Placement
from services.coordinator.propose_deadline import ProposeDeadline
from services.coordinator.quotas import Quotas
from services.coordinator.renewing_link import RenewingLink
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.status import StatusReader
from services.coordinator.tally import CoordinatorTally
from services.coordinator.tokenizer_set import TokenizerSet
from services.coordinator.worker_link import DRAFT_CODEC, TARGET_CODEC, Codec
from services.coordinator.worker_pool import ItemT, ResultT, WorkerPool

log = logging.getLogger(__name__)

_SERVICE = coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"]
_STORE_START_S = 10.0
_WORKERS_START_S = 2.0
_NOTICE_S = 0.2
"""Between saying NOT_SERVING and refusing new generations, so that clients hear of it."""


@dataclass(frozen=True, slots=True)
class RunningCoordinator:
    """A coordinator that listens."""

    port: int
    server: GrpcServer
    coordinator: Coordinator
    placement: Placement
    registry: CollectorRegistry
    metrics_port: int

    async def wait_ready(self, timeout_s: float) -> bool:
        """Whether a target was connected within `timeout_s`; then health says SERVING."""
        up = await self.placement.wait_up(target_s=timeout_s, others_s=_WORKERS_START_S)
        if up:
            await self.server.set_ready(True)
        return up


@contextlib.asynccontextmanager
async def running_coordinator(
    config: CoordinatorConfig, metrics_port: int = METRICS_OFF, tracer: Tracer = NO_TRACER
) -> AsyncIterator[RunningCoordinator]:
    """A coordinator inside this process, from enter to exit; ready after `wait_ready`.

    Raises ConfigError for a tokenizer or a Redis that cannot serve, Unavailable where no Redis answers, OSError where
    the port is taken.
    """
    tokenizers = await asyncio.to_thread(TokenizerSet.load, config.tokenizers)
    store = SessionStore.connect(
        config.redis_url, str(uuid.uuid4()), idle_s=config.session_idle_s, tombstone_s=config.tombstone_s
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.aclose)
        await _check_store(store)
        placement = await asyncio.to_thread(_placement, config, tokenizers)
        stack.enter_context(short_slices())
        committer = Committer(store, outage=Outage(config.redis_outage), outage_after_s=config.redis_outage_after_s)
        caps = Caps(config.max_client_sessions, config.max_client_tokens)
        tally, calls = CoordinatorTally(), CallTally(EXPECTED_CALLS)
        coordinator = Coordinator(
            config,
            tokenizers=tokenizers,
            placement=placement,
            store=store,
            committer=committer,
            usage=SessionUsage(store.redis, caps, idle_s=config.session_idle_s),
            tally=tally,
            tracer=tracer,
        )
        registry = new_registry(calls, {"role": "coordinator"})
        registry.register(CoordinatorCollector(tally, coordinator, placement))
        bound_metrics_port = stack.enter_context(metrics_endpoint(config.host, metrics_port, registry))
        status = StatusReader(store.owner_id, tally, calls, lambda: placement.workers)
        authenticator = Authenticator(KeyFile(Path(config.api_keys_file)) if config.api_keys_file else None)
        quotas = Quotas(QuotaLedger(store.redis))
        await stack.enter_async_context(quotas.reporting())
        servicer = CoordinatorServicer(
            config, coordinator, placement, tokenizers, status, authenticator=authenticator, quotas=quotas
        )
        server = _server(config, authenticator, quotas, calls)
        server.add(_SERVICE, servicer)
        await stack.enter_async_context(server)
        coordinator.start()
        stack.push_async_callback(coordinator.aclose)  # before the server stops: streams are told that they may resume
        yield RunningCoordinator(server.port, server, coordinator, placement, registry, bound_metrics_port)
        await server.set_ready(False)


def _server(config: CoordinatorConfig, authenticator: Authenticator, quotas: Quotas, calls: CallTally) -> GrpcServer:
    tls = config.load_public_tls()
    if not (authenticator.required or config.tls_client_ca or is_loopback(config.host)):
        log.warning("whoever reaches %s may use this service: there is no api_keys_file, no tls_client_ca", config.host)
    limits = ServerLimits(
        max_message_bytes=MAX_PUBLIC_MESSAGE_BYTES,
        max_connections=config.max_connections,
        max_streams_a_connection=config.max_generations + 2 * SPARE_CALLS,
        max_concurrent_rpcs=2 * (config.max_generations + SPARE_CALLS),
    )
    keys = ApiKeys(authenticator, quotas, OpenCalls(config.max_generations), calls, _SERVICE.methods_by_name)
    return GrpcServer(
        config.host,
        config.port,
        limits=limits,
        credentials=server_credentials(tls) if tls else None,
        interceptors=[keys] if authenticator.required else [],
        probe_port=config.probe_port_number,
        reflect=config.reflection,
        calls=calls,
        max_connection_age_s=config.max_connection_age_s,
    )


def _placement(config: CoordinatorConfig, tokenizers: TokenizerSet) -> Placement:
    """Raises ConfigError where workers cannot be discovered as configured. May take long."""
    tls = config.load_tls()
    target_channels, draft_channels = (Channels(tls, name=n) for n in (config.tls_target_name, config.tls_draft_name))
    targets = _pool(config, "targets", config.target_sources, TARGET_CODEC, target_channels)
    drafts = [
        DraftPool(
            pool.name,
            pool.weight,
            _pool(config, f"draft pool {pool.name}", pool.sources, DRAFT_CODEC, draft_channels),
            lambda: ProposeDeadline(config.propose_timeout_s, config.min_propose_ms / 1e3),
            pool.model,
        )
        for pool in config.draft_pools
    ]
    return Placement(targets, drafts, tokenizers)


def _pool(
    config: CoordinatorConfig,
    name: str,
    sources: Sequence[Source],
    codec: Codec[ItemT, ResultT],
    channels: Channels,
) -> WorkerPool[ItemT, ResultT]:
    discoveries = [source.discovery(config.dns_interval_s) for source in sources]
    return WorkerPool(discoveries, lambda address: RenewingLink(address, codec, channels), name)


async def _check_store(store: SessionStore) -> None:
    """Gives a store that starts at the same time a while to come up."""
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        stop=tenacity.stop_after_delay(_STORE_START_S),
        wait=tenacity.wait_exponential(multiplier=0.1, max=1.0),
        reraise=True,
    )
    await retrying(store.check_server)


async def serve(config: CoordinatorConfig) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    with stop_signals() as stop, open_tracer(config.trace_endpoint, config.trace_sample, "coordinator") as tracer:
        async with running_coordinator(config, config.metrics_port, tracer) as running:
            stopped = asyncio.create_task(stop.wait())
            while not stop.is_set() and not await running.wait_ready(0.5):
                pass
            if not stop.is_set():
                announce_ready("coordinator", running.port, metrics_port=running.metrics_port)
                log.info("serving on port %d", running.port)
            await stopped
            await running.server.set_ready(False)
            await asyncio.sleep(_NOTICE_S)
            if not await running.coordinator.drain(config.drain_s):
                log.warning("generations were running after %g s; they may be resumed", config.drain_s)
