"""gRPC method handlers that stand before others.

Owns: the four kinds of handler and the two ways to answer with a stream. Must not know: what is done before a method.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


def prepared(
    handler: Any, prepare: Callable[[Any, Context], Awaitable[Any]], *, request_streaming: bool | None = None
) -> Handler:
    """The same handler behind `prepare`, which gets the request, or the stream of them, and returns what the handler
    is to get; what it raises ends the call. With `request_streaming` it gets a stream, or not, whatever the handler
    gets.

    The handler is a coroutine function, which may write a stream of responses itself, or an async generator function.
    """
    behaviour = _BEHAVIOURS[handler.request_streaming, handler.response_streaming](handler)

    async def answer(request: Any, context: Context) -> Any:
        return await behaviour(await prepare(request, context), context)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        async with contextlib.aclosing(behaviour(await prepare(request, context), context)) as responses:
            async for response in responses:
                yield response

    streaming = handler.request_streaming if request_streaming is None else request_streaming
    make = _MAKERS[streaming, handler.response_streaming]
    wrapped = stream if inspect.isasyncgenfunction(behaviour) else answer
    return make(wrapped, handler.request_deserializer, handler.response_serializer)


_BEHAVIOURS: dict[tuple[bool, bool], Callable[[Any], Callable[..., Any]]] = {
    (False, False): lambda handler: handler.unary_unary,
    (False, True): lambda handler: handler.unary_stream,
    (True, False): lambda handler: handler.stream_unary,
    (True, True): lambda handler: handler.stream_stream,
}
_MAKERS: dict[tuple[bool, bool], Callable[..., Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
