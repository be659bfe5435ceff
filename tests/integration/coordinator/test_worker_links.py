"""A link to a worker outlives whatever answers at its address: only `aclose` ends it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest
from outrider.v1 import worker_pb2

from services.common.errors import OutriderError
from services.common.service import wait_until
from services.common.values import PROTOCOL_VERSION
from services.coordinator.worker_link import DRAFT_CODEC, WorkerLink
from services.draft.server import running_draft
from tests.fakes.ports import held_port
from tests.integration.coordinator.conftest import DRAFT

GARBAGE = b"\xff\xff\xff"
INFO = worker_pb2.GetWorkerInfoResponse(
    instance_id="x", role=worker_pb2.WORKER_ROLE_DRAFT, protocol_version=PROTOCOL_VERSION
).SerializeToString()


class Odd:
    """Answers as no worker does: tells `info` of itself, streams `message`, ends the stream with `trailers`."""

    def __init__(self, info: bytes = INFO, message: bytes | None = None, trailers: bytes | None = None) -> None:
        self.info, self.message, self.trailers = info, message, trailers
        self.num_asked = 0
        self.answering, self.ending = asyncio.Event(), asyncio.Event()
        self.answering.set()
        self.ending.set()

    async def GetWorkerInfo(self, request: bytes, context: Any) -> bytes:
        self.num_asked += 1
        await self.answering.wait()
        return self.info

    async def DraftStream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        if self.message is not None:
            yield self.message
        await self.ending.wait()
        if self.trailers is not None:
            metadata = (("grpc-status-details-bin", self.trailers),)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "a proxy says no", metadata)


@contextlib.asynccontextmanager
async def serving(odd: Odd, port: int) -> AsyncIterator[None]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "outrider.v1.WorkerService", {"GetWorkerInfo": grpc.unary_unary_rpc_method_handler(odd.GetWorkerInfo)}
            ),
            grpc.method_handlers_generic_handler(
                "outrider.v1.DraftService", {"DraftStream": grpc.stream_stream_rpc_method_handler(odd.DraftStream)}
            ),
        )
    )
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    "odd",
    [{"info": GARBAGE}, {"message": GARBAGE}, {"trailers": GARBAGE}],
    ids=["tells garbage of itself", "streams garbage", "ends with garbage"],
)
async def test_whatever_answers_at_a_workers_address_the_worker_is_used_when_it_is_there(odd: dict[str, bytes]) -> None:
    with held_port() as port:
        link, answering = WorkerLink(f"127.0.0.1:{port}", DRAFT_CODEC), Odd(**odd)
        try:
            async with serving(answering, port):
                link.start()
                assert await wait_until(lambda: answering.num_asked > 1, 5), link.trouble
            async with running_draft(replace(DRAFT, port=port)) as draft:
                instance_id = draft.worker.info.instance_id
                assert await wait_until(lambda: link.up and link.info.instance_id == instance_id, 5), link.trouble
        finally:
            await link.aclose()


async def test_a_worker_that_breaks_off_while_it_is_asked_how_it_is_has_told_nothing() -> None:
    with held_port() as port:
        link, odd = WorkerLink(f"127.0.0.1:{port}", DRAFT_CODEC), Odd()
        odd.ending.clear()
        try:
            async with serving(odd, port):
                link.start()
                assert await link.wait_up(5)
                odd.answering.clear()
                asking = asyncio.create_task(link.describe(5.0))
                assert await wait_until(lambda: odd.num_asked > 1, 5)
                odd.ending.set()
                await asyncio.wait([asking], timeout=2)
                with pytest.raises(OutriderError):
                    asking.result()
                odd.answering.set()
        finally:
            await link.aclose()


async def test_a_load_that_cannot_be_decoded_once_is_asked_for_again() -> None:
    with held_port() as port:
        link, odd = WorkerLink(f"127.0.0.1:{port}", DRAFT_CODEC), Odd()
        odd.ending.clear()
        try:
            async with serving(odd, port):
                link.start()
                assert await link.wait_up(5)
                odd.info = GARBAGE
                assert await wait_until(lambda: odd.num_asked > 1, 5)
                odd.info = INFO + worker_pb2.GetWorkerInfoResponse(load={"num_sequences": 7}).SerializeToString()
                assert await wait_until(lambda: link.load.num_sequences == 7, 5)
                odd.ending.set()
        finally:
            await link.aclose()
