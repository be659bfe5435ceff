"""Who may call a worker: whoever's certificate carries a coordinator's name.

Owns: the one check of a peer's name, for every method of a server. Must not know: the methods, how certificates are
made. The certificate itself was verified in the handshake; here only its names count, DNS and URI ones alone: an
e-mail address or a common name is no name of a service.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from services.common.errors import PermissionDenied
from services.common.handlers import Context, Handler, prepared
from services.common.rpc_errors import abort

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
    ) -> Handler | None:
        handler = await continuation(details)
        return handler and prepared(handler, self._check)

    async def _check(self, request: Any, context: Context) -> Any:
        properties = context.auth_context()
        names = [name.decode() for key in _NAME_PROPERTIES for name in properties.get(key, ())]
        if not any(map(self.admits, names)):
            shown = ", ".join(names) or "no name"
            await abort(context, PermissionDenied("WRONG_PEER", f"a peer with {shown} may not call this service"))
        return request
