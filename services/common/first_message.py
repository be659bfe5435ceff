"""That a call's one message comes soon.

Owns: how a server reads it, and what a call is told whose message does not come. Must not know: the methods.

gRPC's library reads the message of a call with a single request before any code of ours runs, for as long as the
connection lives, while the call takes one of the places that all calls share. So such methods are registered as ones
that take a stream, which is the same on the wire, and their one message is read here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from services.common.errors import DeadlineExceeded, InvalidArgument, OutriderError
from services.common.handlers import Context, Handler, prepared
from services.common.rpc_errors import abort, code_name
from services.common.tally import CallTally


class FirstMessage(grpc.aio.ServerInterceptor):
    """Ends calls with a single request that bring none within `patience_s` with DEADLINE_EXCEEDED/NO_MESSAGE; `calls`
    counts them. The last interceptor: those before it then see calls whose messages have not come yet.
    """

    def __init__(self, patience_s: float, calls: CallTally) -> None:
        self._patience_s = patience_s
        self._calls = calls

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Handler | None:
        handler: Handler | None = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler

        async def read(_: object, context: Context) -> Any:
            try:
                return await self._message(details.method, context)
            except OutriderError as error:
                await self._end(details.method, context, error)

        return prepared(handler, read, request_streaming=True)

    async def _message(self, method: str, context: Context) -> Any:
        try:
            async with asyncio.timeout(self._patience_s):
                message = await context.read()
        except TimeoutError:
            late = f"{method}: the message, or the rest of it, did not come within {self._patience_s:g} s of the call"
            raise DeadlineExceeded("NO_MESSAGE", late, field="message") from None
        if message is grpc.aio.EOF:
            raise InvalidArgument("UNDECODABLE", f"{method}: the call ended without a message", field="message")
        return message

    async def _end(self, method: str, context: Context, error: OutriderError) -> None:
        """Not counted where nobody could be told: a call that was cancelled ended without a message as well."""
        try:
            await abort(context, error)
        except grpc.aio.AbortError:
            self._calls.ended(method.rpartition("/")[2], code_name(error), error.reason)
            raise
