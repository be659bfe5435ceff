"""The client's channels: one for each coordinator address, opened when first used.

Owns: which coordinator is preferred at the moment. Must not know: what is called on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import grpc.aio
from outrider.v1.coordinator_pb2_grpc import CoordinatorServiceStub

from services.common.rpc import MAX_PUBLIC_MESSAGE_BYTES, channel_options

if TYPE_CHECKING:
    from outrider.v1.coordinator_pb2_grpc import CoordinatorServiceAsyncStub


class Connection(NamedTuple):
    """A coordinator's stub, and its place among the addresses."""

    place: int
    address: str
    stub: CoordinatorServiceAsyncStub


class Connections:
    """Channels to interchangeable coordinators. Not safe across event loops."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Raises ValueError without an address."""
        if not addresses:
            raise ValueError("at least one coordinator address is needed")
        self._addresses = tuple(addresses)
        self._channels: dict[int, grpc.aio.Channel] = {}
        self._preferred = 0

    def __len__(self) -> int:
        return len(self._addresses)

    def current(self) -> Connection:
        """The preferred coordinator. Connects in the background; a call fails with UNAVAILABLE if that fails."""
        place = self._preferred
        if place not in self._channels:
            options = channel_options(MAX_PUBLIC_MESSAGE_BYTES)
            self._channels[place] = grpc.aio.insecure_channel(self._addresses[place], options=options)
        return Connection(place, self._addresses[place], CoordinatorServiceStub(self._channels[place]))

    def avoid(self, connection: Connection) -> None:
        """Prefers the next address, unless another caller has turned away from `connection` already."""
        if self._preferred == connection.place:
            self._preferred = (connection.place + 1) % len(self._addresses)

    async def close(self) -> None:
        """Closes all channels; calls in progress are cancelled."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()
