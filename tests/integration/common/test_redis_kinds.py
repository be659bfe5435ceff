"""The store on every kind of Redis: password, TLS with client certificates, Sentinel with a failover."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvloop
from redis import Redis
from redis.asyncio import Redis as ClientOfRedis
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.common import redis_client
from services.common.errors import ConfigError, Unavailable
from services.common.quota_ledger import QuotaLedger, Use
from services.common.service import wait_until
from services.common.session_store import Acquisition, Commit, RecordLost, SessionStore
from services.common.session_usage import Caps, SessionUsage
from tests.fakes.redis_process import RedisProcess, running
from tests.fakes.tcp_proxy import proxied

SESSION = "6a3c2f60-0000-4000-8000-000000000001"
FIRST = Acquisition(SESSION, None, 0, (1, 2, 3), b"\0\0\0", {"request_id": "r1", "prompt_len": "3"})


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[SessionStore]:
    store = SessionStore.connect(url, "one", idle_s=60, tombstone_s=600)
    try:
        yield store
    finally:
        await store.aclose()


async def check_round_trip(url: str) -> None:
    async with connected(url) as store:
        await store.check_server()
        epoch = await store.acquire(FIRST)
        assert await store.write_all([Commit(SESSION, epoch, 3, (7,), b"\1")]) == [None]
        record = await store.load(SESSION)
        assert record is not None
        assert record.token_ids == (1, 2, 3, 7)


async def check_refusal(url: str) -> None:
    async with connected(url) as store:
        with pytest.raises(Unavailable) as caught:
            await store.acquire(FIRST)
        assert caught.value.reason == "STORE_UNAVAILABLE"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_connection_lost_between_two_writes_is_unavailable_and_the_next_write_has_another(
    tmp_path: Path, run: Callable[[Coroutine[None, None, None]], None]
) -> None:
    async def write() -> None:
        async with connected(server.url) as store:
            commit = Commit(SESSION, await store.acquire(FIRST), 3, (7,), b"\1")
            assert await store.write_all([commit]) == [None]
            [connection] = store.redis.connection_pool._available_connections
            connection._writer.transport.abort()
            with pytest.raises(Unavailable):
                await store.write_all([commit])
            assert await store.write_all([commit]) == [None]

    with running(tmp_path) as server:
        run(write())


def stand_still() -> None:
    """The event loop with it."""
    time.sleep(0.06)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("connects", [True, False])
def test_a_process_that_stands_still_does_not_take_the_server_for_silent(
    tmp_path: Path, run: Callable[[Coroutine[None, None, None]], None], connects: bool
) -> None:
    async def read() -> None:
        redis = redis_client.connect(server.url, 0.05)
        try:
            if not connects:
                await redis.ping()
            reading = asyncio.create_task(redis.ping())
            while not reading.done():  # wherever it waits
                await asyncio.sleep(0)
                stand_still()
            assert await reading
        finally:
            await redis_client.close(redis)

    with running(tmp_path) as server:
        run(read())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_server_that_stands_still_is_given_up_in_time(
    tmp_path: Path, run: Callable[[Coroutine[None, None, None]], None]
) -> None:
    async def read() -> None:
        redis = redis_client.connect(server.url, 0.2)
        try:
            await redis.ping()
            server.pause()
            async with asyncio.timeout(5):
                with pytest.raises(RedisTimeoutError):  # with the connection that is there
                    await redis.ping()
                with pytest.raises(RedisTimeoutError):  # with a new one
                    await redis.ping()
        finally:
            server.wake()
            await redis_client.close(redis)

    with running(tmp_path) as server:
        run(read())


async def test_a_password(tmp_path: Path) -> None:
    with running(tmp_path, "--requirepass", "p@ss/word", url="redis://:p%40ss%2Fword@127.0.0.1:{port}/0") as server:
        await check_round_trip(server.url)
        await check_refusal(f"redis://127.0.0.1:{server.port}/0")
        await check_refusal(f"redis://:other@127.0.0.1:{server.port}/0")


async def test_a_socket_file(tmp_path: Path) -> None:
    with running(tmp_path, "--unixsocket", str(tmp_path / "s")):
        await check_round_trip(f"unix://{tmp_path / 's'}")


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[RedisProcess, dict[str, str]]]:
    """A server that asks for certificates, and all files; its URL names those of a client."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip(
            "the bundled server has no TLS, and there is no redis-server (Debian: apt-get install redis-server)"
        )
    trustme = pytest.importorskip("trustme")
    authority, stranger = trustme.CA(), trustme.CA()
    certificate, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("client@example.org")
    files = {name: str(tmp_path / name) for name in ("ca", "other-ca", "server", "server-key", "client", "client-key")}
    authority.cert_pem.write_to_path(files["ca"])
    stranger.cert_pem.write_to_path(files["other-ca"])
    certificate.cert_chain_pems[0].write_to_path(files["server"])
    certificate.private_key_pem.write_to_path(files["server-key"])
    client.cert_chain_pems[0].write_to_path(files["client"])
    client.private_key_pem.write_to_path(files["client-key"])
    own = f"ssl_certfile={files['client']}&ssl_keyfile={files['client-key']}"
    flags = ["--tls-cert-file", files["server"], "--tls-key-file", files["server-key"]]
    flags += ["--tls-ca-cert-file", files["ca"]]
    url = f"rediss://127.0.0.1:{{port}}/0?ssl_ca_certs={files['ca']}&{own}"
    with running(tmp_path, *flags, binary=binary, url=url) as server:
        yield server, files


async def test_tls_with_client_certificates(tls_server: tuple[RedisProcess, dict[str, str]]) -> None:
    server, files = tls_server
    await check_round_trip(server.url)
    await check_refusal(f"rediss://127.0.0.1:{server.port}/0?ssl_ca_certs={files['ca']}")
    await check_refusal(server.url.replace(files["ca"], files["other-ca"]))


async def test_a_silent_servers_tls_connections_are_closed_without_its_farewell(
    tls_server: tuple[RedisProcess, dict[str, str]],
) -> None:
    server, _ = tls_server
    async with proxied("127.0.0.1", server.port) as proxy:
        client = redis_client.connect(server.url.replace(f":{server.port}/", f":{proxy.port}/"), 0.2)
        assert await client.ping()
        proxy.silence()
        async with asyncio.timeout(5):
            await redis_client.close(client)


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[tuple[RedisProcess, RedisProcess, str]]:
    """A master, its replica, and the URL of three Sentinels that watch them."""
    quick = ("--repl-diskless-sync-delay", "0")
    with (
        running(tmp_path, *quick) as master,
        running(tmp_path, *quick, "--replicaof", "127.0.0.1", str(master.port)) as replica,
        ExitStack() as stack,
    ):
        watching = [stack.enter_context(running(tmp_path, sentinel=True)) for _ in range(3)]
        for sentinel in watching:
            with Redis(port=sentinel.port) as client:
                client.sentinel_monitor("main", "127.0.0.1", master.port, 2)
                client.sentinel_set("main", "down-after-milliseconds", 300)
                client.sentinel_set("main", "failover-timeout", 2000)
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in watching)
        yield master, replica, f"redis+sentinel://{hosts}/main/0"


async def test_a_failover_is_followed_and_what_it_lost_is_known_as_lost(
    sentinels: tuple[RedisProcess, RedisProcess, str],
) -> None:
    master, replica, url = sentinels
    async with connected(url) as store:
        epoch = await store.acquire(FIRST)
        assert await store.write_all([Commit(SESSION, epoch, 3, (7,), b"\1")]) == [None]
        await _until_copied(master, replica, int(url.split(",")[0].rsplit(":", 1)[1]))
        master.kill()
        async with asyncio.timeout(30):
            while True:
                try:
                    [outcome] = await store.write_all([Commit(SESSION, epoch, 4, (8,), b"\1")])
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
        assert outcome is None
        record = await store.load(SESSION)
        assert record is not None
        assert record.token_ids == (1, 2, 3, 7, 8)
        [lost] = await store.write_all([Commit(SESSION, epoch, 9, (8,), b"\1")])
        assert isinstance(lost, RecordLost)


async def _until_copied(master: RedisProcess, replica: RedisProcess, sentinel_port: int) -> None:
    """Until the replica has all, and a Sentinel knows of it and of the other Sentinels."""

    def is_copied() -> bool:
        link = copy.info("replication")["master_link_status"]
        state = sentinel.sentinel_master("main")
        known = state["num-slaves"] == 1 and state["num-other-sentinels"] == 2
        return link == "up" and client.dbsize() == copy.dbsize() and known

    with Redis(port=master.port) as client, Redis(port=replica.port) as copy, Redis(port=sentinel_port) as sentinel:
        assert await wait_until(is_copied, 30)


@pytest.mark.parametrize(
    "url", ["redis+sentinel://", "redis+sentinel://host:1", "redis+sentinel://host:x/main", "redis+sentinel:///main"]
)
def test_a_sentinel_url_that_lacks_something_names_the_setting(url: str) -> None:
    with pytest.raises(ConfigError, match="redis_url"):
        redis_client.connect(url, 1.0)


def test_a_sentinel_urls_parts_reach_the_clients() -> None:
    client = redis_client.connect(
        "rediss+sentinel://user:p%40ss@one:1,two/main/3?ssl_ca_certs=/ca&sentinel_password=secret", 1.0
    )
    pool = client.connection_pool
    assert pool.service_name == "main"
    settings = pool.connection_kwargs
    assert (settings["db"], settings["username"], settings["password"]) == (3, "user", "p@ss")
    sentinels = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(s["host"], s["port"], s["password"]) for s in sentinels] == [
        ("one", 1, "secret"),
        ("two", 26379, "secret"),
    ]
    assert all(s["ssl_ca_certs"] == "/ca" for s in (settings, *sentinels))


def test_a_url_of_too_few_connections_is_refused_with_the_limit() -> None:
    with pytest.raises(ConfigError, match=f"max_connections is 8, but at least {redis_client.MIN_CONNECTIONS}"):
        redis_client.connect("redis://127.0.0.1/0?max_connections=8", 1.0)


async def flush_usage(client: ClientOfRedis) -> bool:
    usage = SessionUsage(client, Caps(1, 1), idle_s=60)
    usage.note("ann", "s", 1)
    await usage.flush()
    return not usage._noted


async def report_quotas(client: ClientOfRedis) -> bool:
    return await QuotaLedger(client).report([Use("ann", 60, 1, 1)]) is not None


async def write_records(client: ClientOfRedis) -> bool:
    with suppress(Unavailable):
        await SessionStore(client, "a", idle_s=60, tombstone_s=60).write_all([Commit(SESSION, 1, 3, (7,), b"\1")])
        return True
    return False


async def load_record(client: ClientOfRedis) -> bool:
    with suppress(Unavailable):
        await SessionStore(client, "a", idle_s=60, tombstone_s=60).load(SESSION)
        return True
    return False


@pytest.mark.parametrize("ask", [flush_usage, report_quotas, write_records, load_record])
async def test_a_server_that_falls_silent_again_and_again_costs_no_connection(
    redis_url: str, ask: Callable[[ClientOfRedis], Coroutine[object, object, bool]]
) -> None:
    async with proxied("127.0.0.1", int(redis_url.rsplit(":", 1)[1].split("/")[0])) as proxy:
        client = redis_client.connect(f"redis://{proxy.address}/0", 0.1)
        client.connection_pool.max_connections = 2
        try:
            for _ in range(4):
                assert await ask(client)
                proxy.silence()
                assert not await ask(client)
                proxy.mend()
        finally:
            await redis_client.close(client)


@pytest.mark.parametrize("evaluated", [False, True])
async def test_a_server_that_became_a_replica_is_left_for_the_one_that_its_name_stands_for_now(
    tmp_path: Path, evaluated: bool
) -> None:
    with running(tmp_path) as old, running(tmp_path) as new:
        async with proxied("127.0.0.1", old.port) as proxy, connected(f"redis://{proxy.address}/0") as store:
            await asyncio.gather(*[store.heartbeat(60_000) for _ in range(3)])
            epoch = await store.acquire(FIRST)
            proxy.target = "127.0.0.1", new.port
            with Redis(port=old.port) as client:
                client.replicaof("127.0.0.1", new.port)
            commit = Commit(SESSION, epoch, 3, (7,), b"\1")
            async with asyncio.timeout(5):
                while True:
                    with suppress(Unavailable):
                        await (store.write_all([commit]) if evaluated else store.heartbeat(60_000))
                        break
                    await asyncio.sleep(0.05)
