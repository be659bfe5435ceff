"""Who may call a worker: whoever's certificate carries a coordinator's name.

Owns: the one check of a peer's name, for every method of a server. Must not know: the methods, how certificates are
made. The certificate itself was verified in the handshake; here only its names count, DNS and URI ones alone: an
e-mail address or a common name is no name of a service.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from services.common.errors import PermissionDenied
from services.common.rpc import abort

_NAME_PROPERTIES = ("peer_dns", "peer_uri")


class PeerNames(grpc.aio.ServerInterceptor):
    """Ends calls of peers without an admitted name with PERMISSION_DENIED/WRONG_PEER. In `patterns` a * stands for any
    characters but dots and slashes."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [re.compile(re.escape(pattern).replace(r"\*", "[^./]*")) for pattern in patterns]

    def admits(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self._patterns)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(details)
        return handler and self._guarded(handler)

    async def _check(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        properties = context.auth_context()
        names = [name.decode() for key in _NAME_PROPERTIES for name in properties.get(key, ())]
        if not any(map(self.admits, names)):
            shown = ", ".join(names) or "no name"
            await abort(context, PermissionDenied("WRONG_PEER", f"a peer with {shown} may not call this service"))

    def _guarded(self, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """The same handler behind the check. All handlers of these servers are coroutines and async generators."""

        async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            await self._check(context)
            return await (handler.stream_unary if handler.request_streaming else handler.unary_unary)(request, context)

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            await self._check(context)
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
            async with contextlib.aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        wrapped = stream if handler.response_streaming else unary
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


_MAKERS: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
