"""A coordinator's end of a worker's stream, for tests that talk to workers over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
from outrider.v1 import draft_pb2_grpc, target_pb2_grpc

from services.common import wire_draft, wire_target
from services.common.items import Tokens
from services.common.rpc import channel_options


class Stream:
    """A coordinator's end of a worker's stream."""

    def __init__(self, call: grpc.aio.StreamStreamCall, codec) -> None:
        self._call = call
        self._codec = codec
        self._results: list = []

    async def send(self, *items) -> None:
        await self._call.write(self._codec.encode_items(items))

    async def next(self):
        while not self._results:
            response = await asyncio.wait_for(self._call.read(), 10)
            self._results += self._codec.decode_results(response)
        return self._results.pop(0)

    async def tokens(self) -> tuple[int, ...]:
        """The tokens of a Decode, up to its end."""
        ids: tuple[int, ...] = ()
        while True:
            result = await self.next()
            assert isinstance(result, Tokens), result
            ids += result.token_ids
            if result.done:
                return ids


@asynccontextmanager
async def target_stream(port: int) -> AsyncIterator[Stream]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        yield Stream(target_pb2_grpc.TargetServiceStub(channel).TargetStream(), wire_target)


@asynccontextmanager
async def draft_stream(port: int) -> AsyncIterator[Stream]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        yield Stream(draft_pb2_grpc.DraftServiceStub(channel).DraftStream(), wire_draft)
