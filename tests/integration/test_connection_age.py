"""A server that lets connections grow only so old: clients come to look for others, and lose no call by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from outrider.v1 import draft_pb2, draft_pb2_grpc

from services.common.rpc import GrpcServer, channel_options
from services.common.service import wait_until

DRAFT = draft_pb2.DESCRIPTOR.services_by_name["DraftService"]


class Peers:
    """Answers every message, and remembers from which connection it came."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def DraftStream(
        self, requests: AsyncIterator[draft_pb2.DraftStreamRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[draft_pb2.DraftStreamResponse]:
        async for _ in requests:
            self.seen.append(context.peer())
            yield draft_pb2.DraftStreamResponse()


@pytest.fixture
async def peers() -> Peers:
    return Peers()


@pytest.fixture
async def port(peers: Peers) -> AsyncIterator[int]:
    server = GrpcServer("127.0.0.1", 0, stop_grace_s=0.1, max_connection_age_s=1)
    server.add(DRAFT, peers)
    async with server:
        yield server.port


async def exchange(stream: grpc.aio.StreamStreamCall) -> None:
    await stream.write(draft_pb2.DraftStreamRequest())
    assert await stream.read() is not grpc.aio.EOF


async def test_calls_outlive_the_age_and_later_ones_come_on_another_connection(peers: Peers, port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        stub = draft_pb2_grpc.DraftServiceStub(channel)
        long = stub.DraftStream()
        await exchange(long)

        async def comes_on_another() -> bool:
            stream = stub.DraftStream()
            try:
                await exchange(stream)
            except grpc.aio.AioRpcError as error:  # begun as the connection was given up: not taken, to be made again
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False
            await stream.done_writing()
            return peers.seen[-1] != peers.seen[0]

        async with asyncio.timeout(20):
            while not await comes_on_another():
                pass
        await exchange(long)
        assert peers.seen[-1] == peers.seen[0]
        await long.done_writing()
        assert await wait_until(long.done, 5)
        assert await long.code() is grpc.StatusCode.OK
