"""The client library over real coordinators that are killed, cut off and silenced: its caller sees one stream."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from services.client import GenerateOptions, OutriderClient, RetryPolicy, TokenIds
from services.client.generation import Generation
from services.common.errors import Unavailable
from services.common.service import wait_until
from services.common.session_record import Acquisition
from services.common.session_store import SessionStore
from services.common.values import TokenOrigin, VerificationMethod
from services.target.server import running_target
from tests.fakes.coordinator_process import coordinator_process
from tests.fakes.homes import session_at
from tests.fakes.redis_process import DURABLE, RedisProcess, running
from tests.fakes.tcp_proxy import TcpProxy, proxied
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster, node

UNHURRIED = replace(TARGET, simulated_step_ms=5.0)
OPTIONS = GenerateOptions(max_tokens=250, temperature=1.0, seed=11, ignore_eos=True)
IMPATIENT = RetryPolicy(
    max_attempts=30, initial_backoff_s=0.01, max_backoff_s=0.1, heartbeat_timeout_s=0.3, first_message_timeout_s=0.5
)


class Seen:
    """What the caller of a generation saw, chunk by chunk."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.durable_len = 0

    async def read(self, generation: Generation, pace_s: float = 0.0) -> Seen:
        async for chunk in generation:
            assert chunk.offset == len(self.token_ids)
            self.token_ids += [token.token_id for token in chunk.tokens]
            self.text += chunk.text
            self.durable_len = chunk.durable_len
            await asyncio.sleep(pace_s)
        assert generation.result.token_ids == tuple(self.token_ids)
        assert generation.result.text == self.text
        return self


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> AsyncIterator[Cluster]:
    async with start_cluster(target=UNHURRIED, heartbeat_ms=50) as running_cluster:
        yield running_cluster


async def undisturbed(cluster: Cluster, options: GenerateOptions = OPTIONS) -> Seen:
    async with OutriderClient(f"127.0.0.1:{cluster.coordinator.port}") as client:
        return await Seen().read(client.generate("hi", options))


@contextlib.asynccontextmanager
async def two_ways(cluster: Cluster, redis_url: str) -> AsyncIterator[list[TcpProxy]]:
    """Proxies before two coordinators."""
    async with (
        node(cluster, redis_url, heartbeat_ms=50) as other,
        proxied("127.0.0.1", cluster.coordinator.port) as first,
        proxied("127.0.0.1", other.port) as second,
    ):
        yield [first, second]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", [VerificationMethod.COUPLED, VerificationMethod.REJECTION])
async def test_no_token_is_lost_or_doubled_whatever_is_cut(
    cluster: Cluster, redis_url: str, seed: int, method: VerificationMethod
) -> None:
    options = replace(OPTIONS, verification=method)
    whole = await undisturbed(cluster, options)
    choose = random.Random(seed)
    async with (
        two_ways(cluster, redis_url) as proxies,
        OutriderClient(*[proxy.address for proxy in proxies], retry=IMPATIENT) as client,
    ):
        generation = client.generate("hi", options, session_id=session_at(0))
        seen = Seen()
        reading = asyncio.create_task(seen.read(generation, choose.choice([0.0, 0.003])))
        await wait_until(lambda: bool(seen.token_ids), timeout_s=10.0)
        for proxy in proxies:
            proxy.reset()
        while not reading.done():
            await asyncio.wait([reading], timeout=choose.uniform(0.02, 0.2))
            proxy = choose.choice(proxies)
            for fault in (proxy.reset, proxy.cut, proxy.silence):
                if choose.random() < 0.4:
                    fault()
            choose.choice(proxies).mend()
            proxies[choose.randrange(2)].mend()
        await reading
        assert (seen.token_ids, seen.text) == (whole.token_ids, whole.text)
        assert generation.result.num_resumptions > 0
    async with OutriderClient(f"127.0.0.1:{cluster.coordinator.port}") as client:
        record = await client.get_session(generation.session_id)
        assert list(record.token_ids[record.prompt_len :]) == whole.token_ids


def process(
    cluster: Cluster, redis_url: str
) -> contextlib.AbstractAsyncContextManager[tuple[asyncio.subprocess.Process, str]]:
    """One more coordinator over the cluster's workers."""
    assert cluster.draft is not None
    return coordinator_process(cluster.target.port, cluster.draft.port, redis_url)


async def test_a_killed_coordinators_generation_goes_on_at_another(cluster: Cluster, redis_url: str) -> None:
    whole = await undisturbed(cluster)
    async with (
        process(cluster, redis_url) as (child, address),
        OutriderClient(address, f"127.0.0.1:{cluster.coordinator.port}") as client,
    ):
        generation, seen = client.generate("hi", OPTIONS, session_id=session_at(0)), Seen()
        reading = asyncio.create_task(seen.read(generation))
        assert await wait_until(lambda: len(seen.token_ids) >= 30, 10, 0.005)
        child.kill()
        await asyncio.wait_for(reading, 10)
    assert (seen.token_ids, seen.text) == (whole.token_ids, whole.text)
    assert generation.result.num_resumptions >= 1


async def test_a_client_that_has_everything_saves_a_generation_that_store_and_coordinator_lost(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    with running(tmp_path) as store:
        async with start_cluster(target=UNHURRIED, redis_url=store.url) as cluster:
            whole = await undisturbed(cluster)
            async with (
                process(cluster, store.url) as (child, address),
                OutriderClient(address, f"127.0.0.1:{cluster.coordinator.port}") as client,
            ):
                generation, seen = client.generate("hi", OPTIONS, session_id=session_at(0)), Seen()
                reading = asyncio.create_task(seen.read(generation))
                assert await wait_until(lambda: len(seen.token_ids) >= 30, 10, 0.005)
                store.kill()
                child.kill()
                await asyncio.to_thread(store.start)
                await asyncio.wait_for(reading, 20)
                record = await client.get_session(generation.session_id)
    assert (seen.token_ids, seen.text) == (whole.token_ids, whole.text)
    assert list(record.token_ids) == [*b"hi", *whole.token_ids]


def stored_origins(store: RedisProcess, session_id: str) -> bytes:
    """Of all tokens in the record."""
    with Redis.from_url(store.url) as redis:
        return bytes(redis.get(f"outrider:{{{session_id}}}:origins"))


@pytest.mark.parametrize("method", [VerificationMethod.COUPLED, VerificationMethod.REJECTION])
async def test_tokens_that_went_out_while_redis_was_away_are_adopted_where_their_coordinator_is_lost_before_it_is_back(
    start_cluster: StartCluster, tmp_path: Path, method: VerificationMethod
) -> None:
    options = replace(OPTIONS, max_tokens=500, verification=method)
    with running(tmp_path, *DURABLE) as store:
        async with start_cluster(target=UNHURRIED, redis_url=store.url) as cluster:
            async with (
                process(cluster, store.url) as (child, address),
                OutriderClient(address, f"127.0.0.1:{cluster.coordinator.port}") as client,
            ):
                generation, seen = client.generate("hi", options, session_id=session_at(0)), Seen()
                reading = asyncio.create_task(seen.read(generation))
                assert await wait_until(lambda: len(seen.token_ids) >= 30, 10, 0.005)
                store.kill()
                assert await wait_until(lambda: len(seen.token_ids) >= seen.durable_len + 100, 10, 0.005)
                child.kill()
                await child.wait()
                given = list(seen.token_ids)
                await asyncio.to_thread(store.start)
                num_stored = len(stored_origins(store, generation.session_id))
                await asyncio.wait_for(reading, 20)
                record = await client.get_session(generation.session_id)
            whole = await undisturbed(cluster, options)
        origins = stored_origins(store, generation.session_id)
    num_given = len(b"hi") + len(given)
    assert num_stored < num_given  # the record lacked them, and nobody but the client had them
    assert {*origins[num_stored:num_given]} == {TokenOrigin.TARGET}  # taken over, not generated again
    assert {*origins[num_given:]} == {TokenOrigin.TARGET, TokenOrigin.DRAFT}
    assert len(seen.token_ids) == 500
    assert seen.token_ids[: len(given)] == given
    assert list(record.token_ids) == [*b"hi", *seen.token_ids]
    assert method is VerificationMethod.REJECTION or (seen.token_ids, seen.text) == (whole.token_ids, whole.text)


async def test_a_redis_that_is_away_for_a_while_costs_new_generations_a_pause(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    with running(tmp_path) as store:
        async with start_cluster(target=UNHURRIED, redis_url=store.url) as cluster:
            store.kill()
            async with OutriderClient(f"127.0.0.1:{cluster.coordinator.port}") as client:
                completing = asyncio.create_task(client.complete("hi", replace(OPTIONS, max_tokens=5)))
                await asyncio.sleep(0.5)
                await asyncio.to_thread(store.start)
                assert len((await asyncio.wait_for(completing, 20)).tokens) == 5


async def test_a_lone_target_that_is_away_for_longer_than_the_coordinator_waits_costs_a_pause(
    start_cluster: StartCluster,
) -> None:
    slow = replace(UNHURRIED, simulated_step_ms=20.0)  # a stopped server lets its streams go on for a second
    async with start_cluster(target=slow, target_retry_s=0.1) as cluster:
        long = replace(OPTIONS, max_tokens=450)
        whole = await undisturbed(cluster, long)
        async with OutriderClient(f"127.0.0.1:{cluster.coordinator.port}") as client:
            generation, seen = client.generate("hi", long), Seen()
            reading = asyncio.create_task(seen.read(generation))
            assert await wait_until(lambda: len(seen.token_ids) >= 30, 10, 0.005)
            await cluster.target.server.__aexit__(None, None, None)
            assert await wait_until(lambda: not cluster.coordinator.coordinator.num_running, 10, 0.005)
            async with running_target(replace(slow, port=cluster.target.port)):
                await asyncio.wait_for(reading, 20)
    assert (seen.token_ids, seen.text) == (whole.token_ids, whole.text)
    assert generation.result.num_resumptions >= 1


async def test_what_stays_unreachable_ends_with_an_error_that_says_how_often_it_was_tried(
    cluster: Cluster, redis_url: str
) -> None:
    policy = replace(IMPATIENT, max_attempts=4)
    async with (
        two_ways(cluster, redis_url) as proxies,
        OutriderClient(*[proxy.address for proxy in proxies], retry=policy) as client,
    ):
        seen = Seen()
        reading = asyncio.create_task(
            seen.read(client.generate("hi", replace(OPTIONS, max_tokens=2000), session_id=session_at(0)))
        )
        assert await wait_until(lambda: len(seen.token_ids) >= 10, 10, 0.005)
        for proxy in proxies:
            proxy.cut()
        with pytest.raises(Unavailable, match="given up after 4 attempts"):
            await asyncio.wait_for(reading, 20)


async def test_an_address_where_something_else_serves_is_passed_over(cluster: Cluster) -> None:
    whole = await undisturbed(cluster)
    async with OutriderClient(f"127.0.0.1:{cluster.target.port}", f"127.0.0.1:{cluster.coordinator.port}") as client:
        generation = client.generate("hi", OPTIONS, session_id=session_at(0))
        seen = await Seen().read(generation)
    async with OutriderClient(f"127.0.0.1:{cluster.target.port}", f"127.0.0.1:{cluster.coordinator.port}") as client:
        record = await client.get_session(generation.session_id)
    assert (seen.token_ids, seen.text) == (whole.token_ids, whole.text)
    assert list(record.token_ids) == [*b"hi", *whole.token_ids]


@pytest.mark.parametrize("silenced", [True, False])
async def test_a_silent_coordinator_is_left_after_the_heartbeats_timeout(
    cluster: Cluster, redis_url: str, silenced: bool
) -> None:
    loop = asyncio.get_running_loop()
    async with (
        two_ways(cluster, redis_url) as proxies,
        OutriderClient(*[proxy.address for proxy in proxies], retry=IMPATIENT) as client,
    ):
        seen = Seen()
        generation = client.generate(TokenIds((65, 66)), OPTIONS, session_id=session_at(0))
        reading = asyncio.create_task(seen.read(generation))
        assert await wait_until(lambda: len(seen.token_ids) >= 10, 10, 0.005)
        if silenced:
            proxies[0].silence()
        num_seen, silent_at = len(seen.token_ids), loop.time()
        assert await wait_until(lambda: len(seen.token_ids) >= num_seen + 20, 10, 0.005)
        pause_s = loop.time() - silent_at
        await reading
        assert generation.result.num_resumptions == int(silenced)
        assert not silenced or IMPATIENT.heartbeat_timeout_s - 0.1 < pause_s < 3


async def test_a_store_that_lost_its_data_and_its_clock_goes_on_beyond_what_workers_know(
    cluster: Cluster, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await undisturbed(cluster)
    epochs: list[int] = []
    acquire = SessionStore.acquire

    async def from_the_future(self: SessionStore, acquisition: Acquisition) -> int:
        ahead = 0 if epochs else 2**42
        epochs.append(await acquire(self, replace(acquisition, least_epoch=max(ahead, acquisition.least_epoch))))
        return epochs[-1]

    monkeypatch.setattr(SessionStore, "acquire", from_the_future)
    async with (
        two_ways(cluster, redis_url) as proxies,
        OutriderClient(*[proxy.address for proxy in proxies], retry=IMPATIENT) as client,
    ):
        generation, seen = client.generate("hi", OPTIONS, session_id=session_at(0)), Seen()
        reading = asyncio.create_task(seen.read(generation))
        assert await wait_until(lambda: len(seen.token_ids) >= 30, 10, 0.005)
        coordinator = cluster.coordinator.coordinator
        for proxy in proxies:
            proxy.cut()
        assert await wait_until(lambda: coordinator.num_running == 0, 5, 0.001)
        with Redis.from_url(redis_url) as store:
            store.flushall()
        for proxy in proxies:
            proxy.mend()
        await asyncio.wait_for(reading, 20)
    assert (seen.token_ids, seen.text) == (whole.token_ids, whole.text)
    assert epochs[0] == 2**42
    assert epochs[-1] > 2**42
