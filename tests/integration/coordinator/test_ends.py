"""Ends and beginnings that meet: stopping coordinators, resumes at starting ones, turns right behind each other."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import coordinator_pb2_grpc, sampling_pb2
from redis import Redis

from services.common import rpc_errors
from services.common.errors import Aborted, InvalidArgument, Unavailable
from services.common.service import wait_until
from services.common.session_store import Acquisition, SessionStore
from services.common.session_usage import SessionUsage
from services.coordinator import admission
from services.coordinator.config import CoordinatorConfig
from services.coordinator.server import running_coordinator
from services.engine import sequence_table
from services.target.server import running_target
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster, coordinating

SAMPLED = sampling_pb2.SamplingParams(temperature=1.0, seed=7)


def new_request(**fields: Any) -> dict[str, Any]:
    ids = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4())}
    return {**ids, "prompt": "hi", "sampling": SAMPLED, "ignore_eos": True, **fields}


async def _read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_coordinator_that_stops_tells_its_streams_that_they_have_moved(redis_url: str) -> None:
    async with running_target(replace(TARGET, simulated_step_ms=10.0)) as target:
        config = CoordinatorConfig(
            port=0, redis_url=redis_url, tokenizer="simulated", targets=f"127.0.0.1:{target.port}"
        )
        async with running_coordinator(config) as coordinator:
            assert await coordinator.wait_ready(10)
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{coordinator.port}")
            call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Generate(
                pb.GenerateRequest(**new_request(max_tokens=3000))
            )
            await call.read()
            assert not await coordinator.coordinator.drain(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_to_the_end(call)
        await channel.close()
    error = rpc_errors.error_from_rpc(caught.value)
    assert (type(error), error.reason) == (Unavailable, "MOVED")


async def test_a_resume_at_a_coordinator_that_has_seen_no_target_yet_may_be_tried_again(
    cluster: Cluster, redis_url: str
) -> None:
    request = new_request(max_tokens=5)
    await cluster.generate(**request)
    config = CoordinatorConfig(port=0, redis_url=redis_url, tokenizer="simulated", targets="127.0.0.1:1")
    async with (
        running_coordinator(config) as starting,
        grpc.aio.insecure_channel(f"127.0.0.1:{starting.port}") as channel,
    ):
        call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Generate(pb.GenerateRequest(**request))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert isinstance(rpc_errors.error_from_rpc(caught.value), Unavailable)


async def test_a_next_turn_may_follow_at_once_behind_a_stream_left(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=3.0)) as cluster:
        for _ in range(10):
            request = new_request(max_tokens=1000)
            call = cluster.stub.Generate(pb.GenerateRequest(**request))
            await call.read()
            await call.read()
            call.cancel()
            turn = await cluster.generate(**{**request, "request_id": str(uuid.uuid4()), "max_tokens": 3})
            assert len(turn.tokens) == 3


@dataclass(frozen=True, slots=True)
class SlowStore:
    """Acquisitions are answered late."""

    acquired: asyncio.Event = field(default_factory=asyncio.Event)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)


@pytest.fixture
def slow_store(monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    slow, acquire = SlowStore(), SessionStore.acquire

    async def acquire_slowly(store: SessionStore, acquisition: Acquisition) -> int:
        epoch = await acquire(store, acquisition)
        slow.acquired.set()
        await slow.may_answer.wait()
        return epoch

    monkeypatch.setattr(SessionStore, "acquire", acquire_slowly)
    return slow


async def test_a_client_that_goes_away_while_its_session_is_acquired_leaves_no_session_that_seems_to_run(
    cluster: Cluster, redis_url: str, slow_store: SlowStore
) -> None:
    request = new_request(max_tokens=1000)
    call = cluster.stub.Generate(pb.GenerateRequest(**request))
    async with asyncio.timeout(5):
        await slow_store.acquired.wait()
        call.cancel()
        await cluster.stub.ListModels(pb.ListModelsRequest())  # arrives behind the cancellation
    slow_store.may_answer.set()
    with Redis.from_url(redis_url) as redis:
        key = f"outrider:{{{request['session_id']}}}:meta"
        assert await wait_until(lambda: redis.hget(key, "running") == b"0", 5.0)
    turn = await cluster.generate(**{**request, "request_id": str(uuid.uuid4()), "max_tokens": 3})
    assert len(turn.tokens) == 3


async def test_a_session_that_is_being_opened_when_the_coordinator_stops_has_moved(
    cluster: Cluster, slow_store: SlowStore
) -> None:
    call = cluster.stub.Generate(pb.GenerateRequest(**new_request(max_tokens=1000)))
    async with asyncio.timeout(5):
        await slow_store.acquired.wait()
        stopping = asyncio.create_task(cluster.coordinator.coordinator.aclose())
        await asyncio.sleep(0)
        slow_store.may_answer.set()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_to_the_end(call)
        await stopping
    error = rpc_errors.error_from_rpc(caught.value)
    assert (type(error), error.reason) == (Unavailable, "MOVED")


async def test_more_alternatives_than_the_vocabulary_has_are_repeated_as_they_were(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (admission, sequence_table):
        monkeypatch.setattr(module, "MAX_TOP_LOG_PROBS", 300)
    request = new_request(max_tokens=5, log_probs=True, num_top_log_probs=300)
    whole, again = await cluster.generate(**request), await cluster.generate(**request)
    assert [list(top.token_ids) for response in whole.responses for top in response.top_log_probs] == [
        list(top.token_ids) for response in again.responses for top in response.top_log_probs
    ]


async def test_nobody_has_received_more_tokens_than_there_can_be(cluster: Cluster) -> None:
    resume = pb.ResumePoint(num_received_tokens=6, tokens_beyond_durable=[65] * 6)
    with pytest.raises(InvalidArgument) as caught:
        await cluster.generate(**new_request(max_tokens=5, resume=resume))
    assert caught.value.field == "resume.num_received_tokens"


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
@pytest.mark.parametrize("method", ["COUPLED", "REJECTION"])
async def test_the_lowest_and_the_highest_seed_work_and_are_kept_on_resume(
    cluster: Cluster, seed: int, method: str
) -> None:
    number = sampling_pb2.VerificationMethod.Value(f"VERIFICATION_METHOD_{method}")
    sampling = sampling_pb2.SamplingParams(temperature=1.0, seed=seed)
    request = new_request(max_tokens=12, sampling=sampling, verification=number)
    whole = await cluster.generate(**request)
    again = await cluster.generate(**request)
    assert whole.started.seed == again.started.seed == seed
    assert whole.tokens == again.tokens
    assert (await cluster.generate(**{**request, "session_id": "", "num_draft_tokens": 0})).tokens == whole.tokens


async def test_a_seed_that_was_drawn_is_kept_on_resume(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=3.0)) as cluster:
        request = new_request(max_tokens=60, sampling=sampling_pb2.SamplingParams(temperature=1.0))
        call = cluster.stub.Generate(pb.GenerateRequest(**request))
        started, first = (await call.read()).started, await call.read()
        call.cancel()
        coordinator = cluster.coordinator.coordinator
        assert await wait_until(lambda: coordinator.num_running == 0, 1.0)
        rest = await cluster.generate(**request, resume=pb.ResumePoint(num_received_tokens=len(first.token_ids)))
        assert rest.started.seed == started.seed
        sampling = sampling_pb2.SamplingParams(temperature=1.0, seed=started.seed)
        whole = await cluster.generate(**new_request(max_tokens=60, sampling=sampling))
        assert [*first.token_ids, *rest.tokens] == whole.tokens


async def test_a_heartbeat_of_a_resumed_stream_counts_what_was_durable_before(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=100.0), heartbeat_ms=10) as cluster:
        request = new_request(max_tokens=30, num_draft_tokens=0)
        call, num_received = cluster.stub.Generate(pb.GenerateRequest(**request)), 0
        while num_received < 3:
            num_received += len((await call.read()).token_ids)
        call.cancel()
        assert await wait_until(lambda: cluster.coordinator.coordinator.num_running == 0, 1.0)
        resume = pb.ResumePoint(num_received_tokens=num_received)
        again = cluster.stub.Generate(pb.GenerateRequest(**request, resume=resume))
        while not (await again.read()).HasField("started"):
            pass  # heartbeats while the session is opened
        heartbeat = await again.read()
        assert not heartbeat.token_ids
        assert heartbeat.durable_len >= num_received
        again.cancel()


async def test_many_resumes_at_once_leave_one_stream_and_one_generation(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=3.0)) as cluster:
        request = new_request(max_tokens=80)
        results = await asyncio.gather(*[cluster.generate(**request) for _ in range(12)], return_exceptions=True)
        whole = [result for result in results if not isinstance(result, BaseException)]
        reasons = {getattr(result, "reason", "") for result in results if isinstance(result, BaseException)}
        assert whole
        assert reasons <= {"OWNERSHIP_LOST", "SESSION_BUSY"}
        assert len({tuple(result.tokens) for result in whole}) == 1
        engines = [worker.engine for worker in (cluster.target, cluster.draft) if worker]
        assert await wait_until(lambda: all(engine.load.num_sequences == 0 for engine in engines), 1.0)


async def test_a_client_that_goes_away_while_its_stream_is_blocked_frees_its_sequences(
    start_cluster: StartCluster, redis_url: str
) -> None:
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with (
        start_cluster(max_unread_tokens=16, slow_client_s=60.0) as cluster,
        grpc.aio.insecure_channel(f"127.0.0.1:{cluster.coordinator.port}", options=narrow) as channel,
    ):
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        request = new_request(max_tokens=30_000, num_draft_tokens=0)
        call = stub.Generate(pb.GenerateRequest(**request))
        await call.read()
        engine, lens = cluster.target.engine, [0]
        with Redis.from_url(redis_url) as redis:

            def is_blocked() -> bool:  # the record grows as long as the stream takes tokens
                lens.append(redis.strlen(f"outrider:{{{request['session_id']}}}:tokens"))
                return lens[-6:].count(lens[-1]) == 6

            assert await wait_until(is_blocked, 30.0)
        assert lens[-1] < 4 * 30_000
        assert engine.load.num_sequences == 1
        call.cancel()
        assert await wait_until(lambda: engine.load.num_sequences == 0, 1.0)


@pytest.mark.parametrize("part", ["reserve", "acquire"])
@pytest.mark.parametrize("turn", [1, 2])
async def test_a_turn_whose_opening_fails_holds_nothing_of_its_clients_tokens(
    start_cluster: StartCluster, redis_url: str, monkeypatch: pytest.MonkeyPatch, part: str, turn: int
) -> None:
    owner = {"reserve": SessionUsage, "acquire": SessionStore}[part]
    honest = getattr(owner, part)

    async def answered_too_late(*arguments: object) -> None:
        await honest(*arguments)
        raise Unavailable("STORE_UNAVAILABLE", "too late")

    async with start_cluster(max_client_tokens=200) as cluster:
        with Redis.from_url(redis_url) as redis:

            def num_held() -> int:
                return int(redis.get("outrider:usage:{anonymous}:total") or 0)

            request = {"session_id": str(uuid.uuid4()), "prompt": "a", "ignore_eos": True}
            for _ in range(1, turn):
                await cluster.generate(**request, max_tokens=5)
            stored = 6 * (turn - 1)
            assert await wait_until(lambda: num_held() == stored, 5)
            monkeypatch.setattr(owner, part, answered_too_late)
            with pytest.raises(Unavailable):
                await cluster.generate(**request, max_tokens=150)
            assert await wait_until(lambda: num_held() == stored, 2)


async def test_who_is_late_for_a_session_leaves_what_its_new_owner_holds(
    start_cluster: StartCluster, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, request = SessionStore.acquire, new_request(max_tokens=150)
    async with start_cluster(max_client_tokens=400, target=replace(TARGET, simulated_step_ms=50.0)) as cluster:
        targets = f"127.0.0.1:{cluster.target.port}"
        config = CoordinatorConfig(
            port=0, redis_url=redis_url, tokenizer="simulated", targets=targets, max_client_tokens=400
        )
        async with coordinating(config) as (_, other), contextlib.AsyncExitStack() as stack:

            async def overtaken(store: SessionStore, acquisition: Acquisition) -> int:
                monkeypatch.undo()
                winner = other.Generate(pb.GenerateRequest(**{**request, "request_id": str(uuid.uuid4())}))
                stack.callback(winner.cancel)
                await winner.read()
                return await honest(store, acquisition)

            monkeypatch.setattr(SessionStore, "acquire", overtaken)
            with pytest.raises(Aborted) as caught:
                await cluster.generate(**request)
            assert caught.value.reason == "SESSION_BUSY"
            later = new_request(max_tokens=5)
            await cluster.generate(**later)
            await cluster.stub.CloseSession(pb.CloseSessionRequest(session_id=later["session_id"]))
            with Redis.from_url(redis_url) as redis:

                def num_held() -> int:
                    return int(redis.get("outrider:usage:{anonymous}:total") or 0)

                assert await wait_until(lambda: num_held() <= 152, 5)  # all is written that was noted before
                assert num_held() == 152
