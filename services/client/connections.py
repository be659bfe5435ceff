"""The client's channels: one for each coordinator address, opened when first used.

Owns: which coordinator a call goes to, and that new calls go out with the newest certificates.
Must not know: what is called on it.

A session has its home among the addresses, the same for all clients that name them in the same order: there its turns
meet what is still to be written of them. While the home is failing (services.common.breaker) the next address takes its
place, and when it is back it has its sessions again. Where one address resolves to several coordinators, calls take
them in turn.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import grpc.aio
from outrider.v1.coordinator_pb2_grpc import CoordinatorServiceStub

from services.client.access import Access
from services.common.breaker import CircuitBreaker
from services.common.channels import Channels
from services.common.errors import Internal, Unavailable
from services.common.rpc import MAX_PUBLIC_MESSAGE_BYTES

if TYPE_CHECKING:
    from outrider.v1.coordinator_pb2_grpc import CoordinatorServiceAsyncStub

C = TypeVar("C", bound=grpc.aio.RpcContext)
_TRANSPORT_REASONS = frozenset({"INTERNAL", "UNKNOWN", "CANCELLED", "UNIMPLEMENTED"})
"""Reasons of errors without ErrorInfo: no coordinator answered, but the transport, a proxy, or whoever else has its
address now."""


def another_may_answer(error: BaseException) -> bool:
    """Whether another coordinator may answer what this one did not."""
    return isinstance(error, Unavailable) or (isinstance(error, Internal) and error.reason in _TRANSPORT_REASONS)


def home_of(session_id: str, num_addresses: int) -> int:
    """The place among the addresses that a session's calls go to; 0 without a session."""
    return zlib.crc32(session_id.encode()) % num_addresses


class Connection:
    """A coordinator's stub, its place among the addresses, and the metadata that every call to it needs."""

    def __init__(
        self, place: int, address: str, channel: grpc.aio.Channel, version: int, metadata: Sequence[tuple[str, str]]
    ) -> None:
        self.place = place
        self.address = address
        self.channel = channel
        self.version = version
        self.metadata = tuple(metadata)
        self.stub: CoordinatorServiceAsyncStub = CoordinatorServiceStub(channel)
        self.num_calls = 0

    def track(self, call: C) -> C:
        """Has the channel stay open until the call has ended, even if another one takes its place meanwhile."""
        self.num_calls += 1
        call.add_done_callback(self._ended)
        return call

    def _ended(self, call: object) -> None:
        self.num_calls -= 1


class Connections:
    """Channels to interchangeable coordinators. Not safe across event loops."""

    def __init__(self, addresses: Sequence[str], access: Access | None = None) -> None:
        """Raises ValueError without an address, ConfigError for an `access` that cannot be used."""
        if not addresses:
            raise ValueError("at least one coordinator address is needed")
        access = access or Access()
        self._addresses = tuple(addresses)
        self._metadata = access.metadata(addresses)
        self._channels = Channels(access.load_tls(), max_message_bytes=MAX_PUBLIC_MESSAGE_BYTES, balanced=True)
        self._breakers = [CircuitBreaker() for _ in addresses]
        self._connections: dict[int, Connection] = {}
        self._retired: list[Connection] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._addresses)

    def choose(self, session_id: str, after: Connection | None = None) -> Connection:
        """The session's coordinator, or the first one without a session; where `after` has just failed the caller, the
        next. Those that have failed anybody come last. Connects in the background; a call fails with UNAVAILABLE if
        that fails. Raises RuntimeError behind `close`: nobody would close another channel."""
        if self._closed:
            raise RuntimeError("the client is closed")
        start = home_of(session_id, len(self)) if after is None else after.place + 1
        places = [(start + i) % len(self) for i in range(len(self))]
        place = next((place for place in places if self._breakers[place].allows), places[0])
        self._breakers[place].begin()
        return self._at(place)

    def succeeded(self, connection: Connection) -> None:
        """It has begun to answer a call. (What it goes on with tells nothing: one that stops still does that.)"""
        self._breakers[connection.place].succeeded()

    def failed(self, connection: Connection) -> None:
        """It could not be reached, or broke off: others come first for a while."""
        self._breakers[connection.place].failed(certain=True)

    def _at(self, place: int) -> Connection:
        version = self._channels.version
        connection = self._connections.get(place)
        if connection is None or connection.version != version:
            if connection is not None:
                self._retired.append(connection)
            address = self._addresses[place]
            connection = Connection(place, address, self._channels.open(address), version, self._metadata)
            self._connections[place] = connection
        self._let_go_of_retired()
        return connection

    async def close(self) -> None:
        """Closes all channels; calls in progress are cancelled."""
        self._closed = True
        open_ones, self._connections, self._retired = [*self._connections.values(), *self._retired], {}, []
        for connection in open_ones:
            await connection.channel.close()
        await asyncio.gather(*self._closing)

    def _let_go_of_retired(self) -> None:
        for connection in [connection for connection in self._retired if not connection.num_calls]:
            self._retired.remove(connection)
            task = asyncio.ensure_future(connection.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
