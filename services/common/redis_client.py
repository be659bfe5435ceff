"""From a URL to a client of Redis: a single server, over TLS, over a socket file, or what Sentinels name as the master.

Owns: the forms of the URL. Must not know: what is stored.

    redis://[[user]:password@]host[:port][/db]            rediss://... the same over TLS
    unix:///path[?db=0]
    redis+sentinel://[[user]:password@]host[:port][,host[:port]...]/service[/db]     rediss+sentinel://... over TLS

What redis-py takes as options may follow as `?name=value`, such as ssl_ca_certs, ssl_certfile and ssl_keyfile for TLS;
sentinel_username and sentinel_password are what the Sentinels themselves ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.common.errors import ConfigError
from services.common.patience import patience

SENTINEL_PORT = 26_379
MIN_CONNECTIONS, MAX_CONNECTIONS = 64, 100
"""Of one client; its URL may say otherwise with max_connections. A command that finds them all in use fails as if there
were no server, so callers ask for less than the least at once."""
_SENTINEL = "+sentinel"


def connect(url: str, timeout_s: float) -> Redis:
    """Opens no connection yet. Each command gives up after `timeout_s` of the event loop's own time
    (services.common.patience), and is tried once: callers know when to retry.

    Raises ConfigError for a `url` of no known form, and for one of too few connections.
    """
    options: dict[str, Any] = {
        "protocol": 2,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "client_name": "outrider",
        "max_connections": MAX_CONNECTIONS,
    }
    try:
        if urlsplit(url).scheme.endswith(_SENTINEL):
            client = _through_sentinels(url, options)
        else:
            client = Redis.from_url(url, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"redis_url: {error}") from error
    if (number := client.connection_pool.max_connections) < MIN_CONNECTIONS:
        raise ConfigError(f"redis_url: max_connections is {number}, but at least {MIN_CONNECTIONS} are needed")
    for each in (client, *_sentinels(client)):
        pool = each.connection_pool
        pool.connection_class = _patient(pool.connection_class)
    return client


async def close(client: Redis) -> None:
    """Closes its connections, those to Sentinels included."""
    sentinels = _sentinels(client)
    for each in (client, *sentinels):
        await each.aclose()


def _sentinels(client: Redis) -> list[Redis]:
    """The clients that it asks for the master."""
    pool = client.connection_pool
    return list(pool.sentinel_manager.sentinels) if isinstance(pool, SentinelConnectionPool) else []


class _Patient:
    """A connection whose timeouts are in the event loop's own time: redis-py's own would take a server for silent whose
    answers lie there unread.

    One that is lost between two commands is a ConnectionError, on uvloop as on asyncio: uvloop's transports raise
    RuntimeError once they are closed; those of asyncio drop what is written.
    """

    socket_timeout: float | None
    socket_connect_timeout: float | None
    _writer: asyncio.StreamWriter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timeout_s, self.socket_timeout = self.socket_timeout, None
        self._connect_timeout_s, self.socket_connect_timeout = self.socket_connect_timeout, None

    async def _connect(self) -> None:
        async with _in_time(self._connect_timeout_s, "connecting"):
            await super()._connect()  # type: ignore[misc]

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        """TLS waits half a minute for a silent server's farewell; this gives it up as connecting."""
        if asyncio.current_task() is None:  # finalised: redis-py drops it without waiting
            return await super().disconnect(*args, **kwargs)  # type: ignore[misc,no-any-return]
        writer = self._writer
        try:
            async with _in_time(self._connect_timeout_s, "closing"):
                await super().disconnect(*args, **kwargs)  # type: ignore[misc]
        except RedisTimeoutError:
            if writer is not None:
                writer.transport.abort()

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            async with _in_time(self._timeout_s, "reading"):
                return await super().read_response(*args, **kwargs)  # type: ignore[misc]
        except ReadOnlyError:  # no master any more; its name may stand for another server by now
            await self.disconnect(nowait=True)
            raise

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        try:
            async with _in_time(self._timeout_s, "writing"):
                await super().send_packed_command(command, check_health)  # type: ignore[misc]
        except RuntimeError as error:
            raise RedisConnectionError(f"the connection is lost: {error}") from error


@contextlib.asynccontextmanager
async def _in_time(seconds: float | None, doing: str) -> AsyncIterator[None]:
    """Raises redis-py's TimeoutError after so long; None: never."""
    if seconds is None:
        yield
        return
    try:
        async with patience(seconds):
            yield
    except TimeoutError:
        raise RedisTimeoutError(f"the server took longer than {seconds:g} s: {doing}") from None


def _patient(connection_class: type[AbstractConnection]) -> type[AbstractConnection]:
    return type(connection_class.__name__, (_Patient, connection_class), {})


def _through_sentinels(url: str, options: dict[str, Any]) -> Redis:
    parts = urlsplit(url)
    scheme = parts.scheme.removesuffix(_SENTINEL)
    credentials, _, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.removeprefix("/").partition("/")
    if not hosts or not service:
        raise ValueError("needs Sentinels and a service, as in redis+sentinel://host:26379,host:26379/service/0")
    query = dict(parse_qsl(parts.query))
    of_sentinels = {name: query.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    user = f"{credentials}@" if credentials else ""
    given: dict[str, Any] = dict(parse_url(f"{scheme}://{user}service/{database}?{urlencode(query)}"))
    del given["host"]
    tls = {name: value for name, value in given.items() if name.startswith("ssl_")}
    if scheme == "rediss":
        del given["connection_class"]
        given["ssl"] = tls["ssl"] = True
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        [_address(host) for host in hosts.split(",")],
        sentinel_kwargs={**options, **tls, **{name: value for name, value in of_sentinels.items() if value}},
    )
    client: Redis = sentinel.master_for(service, connection_pool_class=SentinelConnectionPool, **{**options, **given})
    return client


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(SENTINEL_PORT))
    if not host or not port.isdigit():
        raise ValueError(f"{text!r} is no HOST or HOST:PORT of a Sentinel")
    return host, int(port)
