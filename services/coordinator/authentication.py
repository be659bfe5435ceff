"""Who a request comes from.

Owns: reading and refusing credentials, before a message has come. Must not know: what is asked.
The key itself never leaves this module: not into a log, an error or a record.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from typing import Any, cast

import grpc
import grpc.aio

from services.common.api_keys import KeyFile, KeyOwner
from services.common.errors import OutriderError, Unauthenticated
from services.common.rpc_errors import abort, code_name
from services.common.session_store import ANONYMOUS
from services.common.tally import OTHER, CallTally
from services.coordinator.open_calls import OpenCalls
from services.coordinator.quotas import Quotas

_HEADER, _SCHEME = "authorization", "bearer "
_OPEN_TO_ALL = "/grpc.health.v1.Health/"


class Authenticator:
    """Knows the owners of API keys. Without a file everybody is anonymous."""

    def __init__(self, keys: KeyFile | None) -> None:
        self._keys = keys

    @property
    def required(self) -> bool:
        return self._keys is not None

    def identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> KeyOwner:
        """Raises Unauthenticated BAD_CREDENTIALS for no key, several, or a wrong one."""
        if self._keys is None:
            return KeyOwner(ANONYMOUS)
        values = [value for name, value in metadata if name == _HEADER]
        if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_SCHEME):
            raise Unauthenticated("BAD_CREDENTIALS", "send one API key, as metadata `authorization: Bearer KEY`")
        owner = self._keys.current().owner_of(values[0][len(_SCHEME) :].strip())
        if owner is None:
            raise Unauthenticated("BAD_CREDENTIALS", "the API key is not known, or not any more")
        return owner


class ApiKeys(grpc.aio.ServerInterceptor):
    """Refuses calls without a known key, and those that come too fast or are too many at once. Health is open to all,
    but those calls are counted together.

    `calls` counts the refusals, by `methods`; others are whatever strangers make up, and count as one.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        quotas: Quotas,
        open_calls: OpenCalls,
        calls: CallTally,
        methods: Collection[str] = (),
    ) -> None:
        self._authenticator = authenticator
        self._quotas = quotas
        self._open_calls = open_calls
        self._calls = calls
        self._methods = frozenset(methods)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        try:
            await self._admit(details)
        except OutriderError as error:
            method = details.method.rpartition("/")[2]
            self._calls.ended(method if method in self._methods else OTHER, code_name(error), error.reason)
            return _refusing(error)
        handler: grpc.RpcMethodHandler[Any, Any] | None = await continuation(details)
        return handler

    async def _admit(self, details: grpc.HandlerCallDetails) -> None:
        """Raises what refuses the call, which is counted as open as long as its task lives: however that ends."""
        is_open = details.method.startswith(_OPEN_TO_ALL)
        owner = None if is_open else self._authenticator.identify(details.invocation_metadata)
        leave = self._open_calls.enter(owner)
        cast("asyncio.Task[None]", asyncio.current_task()).add_done_callback(lambda _: leave())
        if owner:
            await self._quotas.count_request(owner)


def _refusing(error: OutriderError) -> grpc.RpcMethodHandler[Any, Any]:
    """Answers any method. As a stream's handler it runs before a message is read, however large that would be."""

    async def refuse(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        await abort(context, error)
        yield b""

    return grpc.stream_stream_rpc_method_handler(refuse)
