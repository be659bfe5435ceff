"""Channels to other parts, with the certificates of the moment.

Owns: what a channel is made with. Must not know: what is called on it, when another one is to be opened.
"""

from __future__ import annotations

import grpc.aio

from services.common.rpc import MAX_WORKER_MESSAGE_BYTES, channel_options
from services.common.tls import channel_credentials
from services.common.tls_files import TlsFiles

_ROUND_ROBIN = '{"loadBalancingConfig": [{"round_robin": {}}]}'
_IDLE_MS = 300_000
"""Without a call for this long a balanced channel lets its connections go, which round_robin would open anew else."""


class Channels:
    """Opens channels, in plaintext without `tls`. With a `name`, the server's certificate must have it as a DNS name,
    whatever the address is: pods are reached by addresses that no certificate knows."""

    def __init__(
        self,
        tls: TlsFiles | None = None,
        *,
        name: str = "",
        max_message_bytes: int = MAX_WORKER_MESSAGE_BYTES,
        balanced: bool = False,
    ) -> None:
        """`balanced`: a channel connects to all that its address resolves to, and calls take them in turn."""
        self._tls = tls
        self._options: list[tuple[str, int | str]] = [*channel_options(max_message_bytes)]
        if balanced:
            self._options += [("grpc.service_config", _ROUND_ROBIN), ("grpc.client_idle_timeout_ms", _IDLE_MS)]
        if tls is not None and name:
            self._options.append(("grpc.ssl_target_name_override", name))

    @property
    def version(self) -> int:
        """Of the certificates that the next channel gets; constant without TLS."""
        return self._tls.version if self._tls else 0

    def open(self, address: str) -> grpc.aio.Channel:
        """A new channel, to be closed by the caller. Connects in the background."""
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=self._options)
        material, _ = self._tls.current()
        return grpc.aio.secure_channel(address, channel_credentials(material), options=self._options)
