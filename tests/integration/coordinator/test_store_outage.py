"""Redis goes away under running generations: killed with and without its data, paused, cut off."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from outrider.v1 import coordinator_pb2 as pb
from redis import Redis

from services.common.errors import ConfigError, Unavailable
from services.common.redis_client import MAX_CONNECTIONS
from services.common.service import wait_until
from services.common.session_record import Write
from services.common.session_store import Outcome, SessionStore
from services.coordinator.output import Output
from services.coordinator.trim import Trimmed
from tests.fakes.redis_process import DURABLE, RedisProcess, running
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster, node
from tests.integration.coordinator.test_takeover import Reader, new_request, record_of

UNHURRIED = replace(TARGET, simulated_step_ms=10.0)


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[RedisProcess]:
    with running(tmp_path) as server:
        yield server


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[RedisProcess]:
    with running(tmp_path, *DURABLE) as server:
        yield server


@pytest.fixture(params=["forgetful", "durable"])
def store(request: pytest.FixtureRequest) -> RedisProcess:
    server = request.getfixturevalue(request.param)
    assert isinstance(server, RedisProcess)
    return server


@pytest.fixture
async def cluster(start_cluster: StartCluster, store: RedisProcess) -> AsyncIterator[Cluster]:
    async with start_cluster(target=UNHURRIED, redis_url=store.url, redis_outage_after_s=0.2) as cluster:
        yield cluster


async def restart(store: RedisProcess) -> None:
    await asyncio.to_thread(store.start)


async def test_a_generation_goes_on_while_redis_is_killed_and_its_record_is_completed_afterwards(
    cluster: Cluster, store: RedisProcess
) -> None:
    request = new_request(max_tokens=300)
    whole = await cluster.generate(**{**request, "session_id": "", "request_id": ""})
    reader = Reader(cluster.stub, request)
    await reader.until(20)
    store.kill()
    await reader.until(len(reader.tokens) + 50)
    assert reader.durable_len < len(reader.tokens)
    with pytest.raises(Unavailable) as refused:
        await cluster.generate(**new_request(max_tokens=5))
    assert refused.value.reason == "STORE_UNAVAILABLE"
    assert refused.value.retry_after_ms
    await restart(store)
    await reader.until(len(reader.tokens) + 50)
    assert await reader.task is None
    assert reader.tokens == whole.tokens
    assert reader.durable_len == 300
    session = await cluster.stub.GetSession(pb.GetSessionRequest(session_id=request["session_id"]))
    assert list(session.token_ids) == [*b"hi", *whole.tokens]
    assert (session.finish_reason, session.running) == (pb.FINISH_REASON_LENGTH, False)
    again = await cluster.generate(**request)
    assert (again.tokens, again.text) == (whole.tokens, whole.text)


async def test_one_that_ends_while_redis_is_away_is_recorded_later_and_the_next_turn_waits_for_that(
    cluster: Cluster, store: RedisProcess
) -> None:
    request = new_request(max_tokens=80, log_probs=True, num_top_log_probs=2)
    reader = Reader(cluster.stub, request)
    await reader.until(10)
    store.kill()
    assert await asyncio.wait_for(reader.task, 10) is None
    assert reader.finished
    assert reader.durable_len < len(reader.tokens) == 80
    turn = {**request, "request_id": str(uuid.uuid4()), "tokens": pb.TokenInput(token_ids=[65]), "max_tokens": 2}
    del turn["prompt"]
    with pytest.raises(Unavailable):
        await cluster.generate(**turn)
    await restart(store)
    while True:
        try:
            result = await cluster.generate(**turn)
            break
        except Unavailable:
            await asyncio.sleep(0.01)
    assert list(result.started.prompt_token_ids) == [*b"hi", *reader.tokens, 65]


async def test_a_finished_record_written_again_repeats_its_tail_with_log_probs(
    cluster: Cluster, store: RedisProcess
) -> None:
    request = new_request(max_tokens=60, log_probs=True, num_top_log_probs=2)
    reader = Reader(cluster.stub, request)
    await reader.until(10)
    store.kill()
    assert await asyncio.wait_for(reader.task, 10) is None
    await restart(store)

    committer = cluster.coordinator.coordinator._committer
    assert await wait_until(lambda: not committer.away and not committer.is_behind(request["session_id"]), 10)
    assert await record_of(cluster.stub, request["session_id"]) == reader.tokens
    again = await cluster.generate(**request)
    assert again.tokens == reader.tokens
    assert len([value for response in again.responses for value in response.log_probs]) == 60


async def test_a_redis_that_stands_still_holds_up_nothing_but_new_sessions(
    cluster: Cluster, store: RedisProcess
) -> None:
    reader = Reader(cluster.stub, new_request(max_tokens=200))
    await reader.until(10)
    store.pause()
    try:
        await reader.until(len(reader.tokens) + 40)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(cluster.generate(**new_request(max_tokens=5)), 1)
    finally:
        store.wake()
    assert await reader.task is None
    assert reader.durable_len == len(reader.tokens) == 200


async def test_all_that_are_admitted_while_redis_hesitates_are_opened(
    start_cluster: StartCluster, forgetful: RedisProcess
) -> None:
    number = MAX_CONNECTIONS + 20
    async with start_cluster(redis_url=forgetful.url, max_generations=number) as cluster:
        coordinator = cluster.coordinator.coordinator
        forgetful.pause()
        try:
            generations = [asyncio.create_task(cluster.generate(**new_request(max_tokens=2))) for _ in range(number)]
            assert await wait_until(lambda: coordinator.num_waiting == number, 1.5, 0.01)
        finally:
            forgetful.wake()
        assert {len(result.tokens) for result in await asyncio.gather(*generations)} == {2}


async def test_a_generation_that_shall_stop_with_redis_ends_resumably_and_loses_nothing(
    start_cluster: StartCluster, store: RedisProcess
) -> None:
    settings = {"redis_url": store.url, "redis_outage": "stop", "redis_outage_after_s": 0.2}
    async with start_cluster(target=UNHURRIED, **settings) as cluster:
        request = new_request(max_tokens=100)
        reader = Reader(cluster.stub, request)
        await reader.until(10)
        store.kill()
        error = await asyncio.wait_for(reader.task, 10)
        assert isinstance(error, Unavailable)
        assert (error.reason, bool(error.retry_after_ms)) == ("STORE_UNAVAILABLE", True)
        assert reader.durable_len == len(reader.tokens)
        await restart(store)
        resume = pb.ResumePoint(num_received_tokens=len(reader.tokens))
        while True:
            try:
                rest = await cluster.generate(**request, resume=resume)
                break
            except Unavailable:
                await asyncio.sleep(0.02)
        whole = await cluster.generate(**{**request, "session_id": "", "request_id": ""})
        assert [*reader.tokens, *rest.tokens] == whole.tokens
        assert await record_of(cluster.stub, request["session_id"]) == whole.tokens


def set_policy(store: RedisProcess, policy: str) -> None:
    with Redis.from_url(store.url) as client:
        client.config_set("maxmemory-policy", policy)


async def test_a_store_that_has_come_to_evict_begins_no_session_until_it_is_mended(
    start_cluster: StartCluster, forgetful: RedisProcess, caplog: pytest.LogCaptureFixture
) -> None:
    async with start_cluster(redis_url=forgetful.url, heartbeat_ms=20) as cluster:
        policy = cluster.coordinator.coordinator._store_policy
        request = new_request(max_tokens=5)
        first = await cluster.generate(**request)
        set_policy(forgetful, "volatile-lru")
        assert await wait_until(lambda: policy.unfit, 10, 0.01)
        with pytest.raises(Unavailable, match="maxmemory-policy") as refused:
            await cluster.generate(**new_request(max_tokens=2))
        assert (refused.value.reason, bool(refused.value.retry_after_ms)) == ("STORE_UNAVAILABLE", True)
        assert [record.levelname for record in caplog.records if "volatile-lru" in record.message] == ["ERROR"]
        turn = {**request, "request_id": str(uuid.uuid4()), "prompt": "and"}
        assert list((await cluster.generate(**turn)).started.prompt_token_ids) == [*b"hi", *first.tokens, *b"and"]
        set_policy(forgetful, "noeviction")
        assert await wait_until(lambda: not policy.unfit, 10, 0.01)
        assert len((await cluster.generate(**new_request(max_tokens=2))).tokens) == 2


async def test_no_coordinator_starts_on_a_store_that_evicts(cluster: Cluster, store: RedisProcess) -> None:
    set_policy(store, "allkeys-lru")
    with pytest.raises(ConfigError, match="allkeys-lru, which evicts"):
        async with node(cluster, store.url):
            pass


async def test_no_token_goes_out_before_its_acknowledgement(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    acknowledged = 0
    ahead: list[tuple[int, int]] = []
    write_all: Callable[..., object] = SessionStore.write_all
    put = Output.put

    async def slow_write_all(self: SessionStore, writes: list[Write]) -> list[Outcome]:
        nonlocal acknowledged
        outcomes = await write_all(self, writes)  # type: ignore[misc]
        await asyncio.sleep(0.03)  # stored, but not acknowledged
        acknowledged += sum(len(write.token_ids) for write in writes)  # type: ignore[union-attr]
        return outcomes  # type: ignore[no-any-return]

    def watched_put(self: Output, kept: Trimmed, durable_len: int) -> None:
        end = kept.offset + len(kept.token_ids)
        if end > acknowledged or durable_len > acknowledged:
            ahead.append((end, acknowledged))
        put(self, kept, durable_len)

    monkeypatch.setattr(SessionStore, "write_all", slow_write_all)
    monkeypatch.setattr(Output, "put", watched_put)
    async with start_cluster(target=replace(TARGET, simulated_step_ms=2.0)) as cluster:
        result = await cluster.generate(**new_request(max_tokens=100))
        assert len(result.tokens) == acknowledged == 100
        assert ahead == []
