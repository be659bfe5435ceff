"""The coordinator's composition root: configuration in, a serving coordinator out.

Owns: which parts there are and the order of their lives. Must not know: what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import tenacity
from outrider.v1 import coordinator_pb2

from services.common.errors import Unavailable
from services.common.rpc import MAX_PUBLIC_MESSAGE_BYTES, GrpcServer
from services.common.service import announce_ready, stop_signals
from services.common.session_store import SessionStore
from services.coordinator.committer import Committer
from services.coordinator.config import CoordinatorConfig
from services.coordinator.coordinator import Coordinator
from services.coordinator.draft_length import LengthPolicy
from services.coordinator.placement import DraftPool, Placement
from services.coordinator.servicer import CoordinatorServicer
from services.coordinator.tokenizer import load_tokenizer
from services.coordinator.worker_link import DRAFT_CODEC, TARGET_CODEC, WorkerLink

log = logging.getLogger(__name__)

_STORE_START_S = 10.0
_DRAFT_START_S = 2.0
_NOTICE_S = 0.2
"""Between saying NOT_SERVING and refusing new generations, so that clients hear of it."""


@dataclass(frozen=True, slots=True)
class RunningCoordinator:
    """A coordinator that listens."""

    port: int
    server: GrpcServer
    coordinator: Coordinator
    placement: Placement

    async def wait_ready(self, timeout_s: float) -> bool:
        """Whether the target was connected within `timeout_s`; then health says SERVING."""
        up = await self.placement.wait_up(target_s=timeout_s, draft_s=_DRAFT_START_S)
        if up:
            await self.server.set_ready(True)
        return up


@contextlib.asynccontextmanager
async def running_coordinator(config: CoordinatorConfig) -> AsyncIterator[RunningCoordinator]:
    """A coordinator inside this process, from enter to exit; ready after `wait_ready`.

    Raises ConfigError for a tokenizer or a Redis that cannot serve, Unavailable where no Redis answers, OSError where
    the port is taken.
    """
    tokenizer = await asyncio.to_thread(load_tokenizer, config.tokenizer)
    store = SessionStore.connect(
        config.redis_url, str(uuid.uuid4()), idle_s=config.session_idle_s, tombstone_s=config.tombstone_s
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.aclose)
        await _check_store(store)
        target = WorkerLink(config.target_addresses[0], TARGET_CODEC)
        drafts = [
            DraftPool(name, weight, WorkerLink(address, DRAFT_CODEC), LengthPolicy(lambda: target.load.num_sequences))
            for name, address, weight in config.draft_addresses
        ]
        placement = Placement(target, drafts, tokenizer.vocab_digest)
        committer = Committer(store, retry_s=config.store_retry_s)
        coordinator = Coordinator(config, tokenizer=tokenizer, placement=placement, store=store, committer=committer)
        server = GrpcServer(
            config.host,
            config.port,
            max_message_bytes=MAX_PUBLIC_MESSAGE_BYTES,
            reflect=config.reflection,
            max_connection_age_s=config.max_connection_age_s,
        )
        service = coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"]
        server.add(service, CoordinatorServicer(config, coordinator, placement, tokenizer))
        await stack.enter_async_context(server)
        coordinator.start()
        stack.push_async_callback(coordinator.aclose)  # before the server stops: streams are told that they may resume
        yield RunningCoordinator(server.port, server, coordinator, placement)
        await server.set_ready(False)


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
    with stop_signals() as stop:
        async with running_coordinator(config) as running:
            stopped = asyncio.create_task(stop.wait())
            while not stop.is_set() and not await running.wait_ready(0.5):
                pass
            if not stop.is_set():
                announce_ready("coordinator", running.port)
                log.info("serving on port %d", running.port)
            await stopped
            await running.server.set_ready(False)
            await asyncio.sleep(_NOTICE_S)
            if not await running.coordinator.drain(config.drain_s):
                log.warning("generations were running after %g s; they may be resumed", config.drain_s)
