"""The probe port: health in plaintext, and nothing else.

Owns: that server. Must not know: who is healthy. It stands apart because the kubelet's gRPC probe speaks no TLS.
"""

from __future__ import annotations

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc

_MAX_MESSAGE_BYTES = 4096
_MAX_CONNECTIONS = 32
_MAX_CONCURRENT_STREAMS = 8
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_allowed_incoming_connections", _MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", _MAX_CONCURRENT_STREAMS),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.so_reuseport", 0),
]


class ProbeServer:
    """Async context manager: answers grpc.health.v1 from enter to exit. Raises OSError where the port is taken."""

    def __init__(self, host: str, port: int, servicer: health.aio.HealthServicer) -> None:
        self._address = f"{host}:{port}"
        self._servicer = servicer
        self._server = grpc.aio.server(
            options=_OPTIONS, maximum_concurrent_rpcs=_MAX_CONNECTIONS * _MAX_CONCURRENT_STREAMS
        )
        self.port = 0
        """The bound port, once started."""

    async def __aenter__(self) -> ProbeServer:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            self.port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"probe_port: cannot listen on {self._address}: {error}") from None
        await self._server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._server.stop(0)
