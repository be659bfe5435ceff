"""From a URL to a client of Redis: a single server, over TLS, over a socket file, or what Sentinels name as the master.

Owns: the forms of the URL. Must not know: what is stored.

    redis://[[user]:password@]host[:port][/db]            rediss://... the same over TLS
    unix:///path[?db=0]
    redis+sentinel://[[user]:password@]host[:port][,host[:port]...]/service[/db]     rediss+sentinel://... over TLS

What redis-py takes as options may follow as `?name=value`, such as ssl_ca_certs, ssl_certfile and ssl_keyfile for TLS;
sentinel_username and sentinel_password are what the Sentinels themselves ask for.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.asyncio import Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from services.common.errors import ConfigError

SENTINEL_PORT = 26_379
_SENTINEL = "+sentinel"


def connect(url: str, timeout_s: float) -> Redis:
    """Opens no connection yet. Each command gives up after `timeout_s`, and is tried once: callers know when to retry.

    Raises ConfigError for a `url` of no known form.
    """
    options: dict[str, Any] = {
        "protocol": 2,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "client_name": "outrider",
    }
    try:
        if urlsplit(url).scheme.endswith(_SENTINEL):
            return _through_sentinels(url, options)
        return Redis.from_url(url, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"redis_url: {error}") from error


async def close(client: Redis) -> None:
    """Closes its connections, those to Sentinels included."""
    pool = client.connection_pool
    await client.aclose()
    if isinstance(pool, SentinelConnectionPool):
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


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
