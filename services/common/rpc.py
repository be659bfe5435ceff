"""gRPC plumbing that every service and client shares: channel and server options, servicers, a server's life.

Owns: the options, the decoding of raw request bytes, and that what a method raises becomes its status.
Must not know: what any service does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.errors import Internal, InvalidArgument, OutriderError
from services.common.first_message import FirstMessage
from services.common.probe import ProbeServer
from services.common.rpc_errors import abort, code_name
from services.common.tally import CallTally

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

MAX_WORKER_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_PUBLIC_MESSAGE_BYTES = 16 * 1024 * 1024

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # keepalive's pings wait for this one, a minute by default
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


def channel_options(max_message_bytes: int = MAX_WORKER_MESSAGE_BYTES) -> list[tuple[str, int]]:
    """Keepalive of 5 s with 3 s timeout; messages up to `max_message_bytes`; reconnects within 2 s."""
    return [
        *_KEEPALIVE,
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What peers can make a server hold, before any of its services has a say."""

    max_message_bytes: int = MAX_WORKER_MESSAGE_BYTES
    max_connections: int = 1000
    max_streams_a_connection: int = 256
    max_concurrent_rpcs: int = 1024
    """On all connections together; further ones are refused with RESOURCE_EXHAUSTED."""
    max_pending_calls: int = 1000
    """That Python has not looked at yet. Of those beyond, gRPC answers some CANCELLED, beyond three times this all."""
    handshake_s: float = 10.0
    """For TLS and HTTP/2 together: a peer that has not said its settings by then is disconnected."""
    message_s: float = 10.0
    """For the one message of a call with a single request, all of it; then the call is ended."""
    max_idle_s: float = 600.0
    """A connection without calls is told to go after this long; clients connect again when they need to."""


def server_options(limits: ServerLimits) -> list[tuple[str, int]]:
    """As the channels'; permits their keepalive pings; never shares a port; lets go of slow and of idle peers."""
    return [
        *_KEEPALIVE,
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.max_streams_a_connection),
        ("grpc.server.max_pending_requests", limits.max_pending_calls),
        ("grpc.server.max_pending_requests_hard_limit", 3 * limits.max_pending_calls),
        ("grpc.server_handshake_timeout_ms", int(1e3 * limits.handshake_s)),
        ("grpc.max_connection_idle_ms", int(1e3 * limits.max_idle_s)),
        ("grpc.so_reuseport", 0),
    ]


def connection_age(max_s: int) -> list[tuple[str, int]]:
    """Of a server: after `max_s` a connection is told to go once its calls have ended; 0: never."""
    return [("grpc.max_connection_age_ms", 1000 * max_s)] if max_s else []


# --- Servicers ------------------------------------------------------------------------------------------------------


def add_service(
    server: grpc.aio.Server, descriptor: ServiceDescriptor, servicer: object, calls: CallTally | None = None
) -> None:
    """Registers `servicer`, an object with one coroutine or async generator method for each RPC of the service.

    Messages are decoded here, so that an undecodable one is INVALID_ARGUMENT/UNDECODABLE. An OutriderError that a
    method raises becomes its status; any other exception is logged and becomes INTERNAL/DEFECT. `calls` counts the
    ends.
    """
    calls = calls or CallTally()
    handlers = {method.name: _handler(method, getattr(servicer, method.name), calls) for method in descriptor.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(descriptor.full_name, handlers),))


def _handler(
    method: MethodDescriptor, behaviour: Callable[..., Any], calls: CallTally
) -> grpc.RpcMethodHandler[Any, Any]:
    decode = _decoder(GetMessageClass(method.input_type))

    async def unary(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with _errors_to_status(method, context, calls):
            return await behaviour(decode(request), context)

    async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async with _errors_to_status(method, context, calls):
            incoming = _decoded(request, decode) if method.client_streaming else decode(request)
            async with contextlib.aclosing(behaviour(incoming, context)) as responses:
                async for response in responses:
                    yield response

    serialize = _serialize
    if method.client_streaming and method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(stream, None, serialize)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, None, serialize)
    return grpc.unary_unary_rpc_method_handler(unary, None, serialize)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _decoder(kind: type[M]) -> Callable[[bytes], M]:
    def decode(data: bytes) -> M:
        try:
            return kind.FromString(data)
        except DecodeError as error:
            raise InvalidArgument(
                "UNDECODABLE", f"the bytes sent are no {kind.DESCRIPTOR.full_name}: {error}", field="message"
            ) from None

    return decode


async def _decoded(requests: AsyncIterator[bytes], decode: Callable[[bytes], M]) -> AsyncIterator[M]:
    async for request in requests:
        yield decode(request)


@contextlib.asynccontextmanager
async def _errors_to_status(
    method: MethodDescriptor, context: grpc.aio.ServicerContext[Any, Any], calls: CallTally
) -> AsyncIterator[None]:
    code, reason = "OK", ""
    try:
        yield
    except OutriderError as error:
        code, reason = code_name(error), error.reason
        await abort(context, error)
    except grpc.aio.AbortError:
        code = "ABORTED"
        raise
    except (asyncio.CancelledError, GeneratorExit):
        code = "CANCELLED"
        raise
    except Exception:
        code, reason = "INTERNAL", "DEFECT"
        log.exception("%s failed", method.full_name)
        await abort(context, Internal("DEFECT", "internal error; the server's log has the detail"))
    finally:
        calls.ended(method.name, code, reason)


# --- A server's life ------------------------------------------------------------------------------------------------


class GrpcServer:
    """A gRPC server with health and, optionally, reflection. Async context manager: started on enter, stopped on exit.

    Health: "" is SERVING from the start (alive), the services' names are NOT_SERVING until `set_ready(True)`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        limits: ServerLimits | None = None,
        credentials: grpc.ServerCredentials | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        probe_port: int | None = None,
        reflect: bool = True,
        stop_grace_s: float = 1.0,
        calls: CallTally | None = None,
        max_connection_age_s: int = 0,
    ) -> None:
        """Plaintext without `credentials`. With a `probe_port` health is served there too, in plaintext."""
        limits = limits or ServerLimits()
        self._calls = calls or CallTally()
        self._server = grpc.aio.server(
            options=[*server_options(limits), *connection_age(max_connection_age_s)],
            interceptors=[*interceptors, FirstMessage(limits.message_s, self._calls)],
            maximum_concurrent_rpcs=limits.max_concurrent_rpcs,
        )
        self._credentials = credentials
        self._health = health.aio.HealthServicer()
        self._probe = None if probe_port is None else ProbeServer(host, probe_port, self._health)
        self._names: list[str] = []
        self._reflect = reflect
        self._stop_grace_s = stop_grace_s
        self._address = f"{host}:{port}"
        self.port = 0
        """The bound port, once started."""

    @property
    def probe_port(self) -> int:
        """The probe's bound port, once started; 0 where there is none."""
        return self._probe.port if self._probe else 0

    def add(self, descriptor: ServiceDescriptor, servicer: object) -> None:
        """Registers a service; call before entering."""
        add_service(self._server, descriptor, servicer, self._calls)
        self._names.append(descriptor.full_name)

    async def __aenter__(self) -> GrpcServer:
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._reflect:
            names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._server)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)
        self.port = self._listen()
        if self._probe:
            await self._probe.__aenter__()
        await self._server.start()
        return self

    def _listen(self) -> int:
        try:
            if self._credentials is None:
                return self._server.add_insecure_port(self._address)
            return self._server.add_secure_port(self._address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._address}: {error}") from None

    async def set_ready(self, ready: bool) -> None:
        """What the health service says of the registered services."""
        serving = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._names:
            await self._health.set(name, serving)

    async def __aexit__(self, *exc: object) -> None:
        await self._server.stop(self._stop_grace_s)
        if self._probe:
            await self._probe.__aexit__()
