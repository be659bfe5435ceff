"""Two coordinators on one store: who has a session, and what becomes of the other's writes."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import coordinator_pb2_grpc, sampling_pb2
from redis import Redis

from services.common import rpc_errors
from services.common.errors import Aborted, InvalidArgument, NotFound, OutriderError
from services.common.service import wait_until
from services.common.vocab import SIMULATED_EOS
from tests.fakes.coordinator_process import coordinator_process
from tests.fakes.tcp_proxy import proxied
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster, node

SAMPLED = sampling_pb2.SamplingParams(temperature=1.0, seed=7)
UNHURRIED = replace(TARGET, simulated_step_ms=10.0)


def new_request(**fields: Any) -> dict[str, Any]:
    ids = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4())}
    return {**ids, "prompt": "hi", "sampling": SAMPLED, "ignore_eos": True, **fields}


class Reader:
    """Reads a stream in the background."""

    def __init__(self, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, request: dict[str, Any]) -> None:
        self.tokens: list[int] = []
        self.durable_len = 0
        self.finished = False
        self._call = stub.Generate(pb.GenerateRequest(**request))
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> OutriderError | None:
        try:
            async for response in self._call:
                self.tokens += response.token_ids
                self.durable_len = max(self.durable_len, response.durable_len)
                self.finished = response.HasField("finished")
        except grpc.aio.AioRpcError as error:
            return rpc_errors.error_from_rpc(error)
        return None

    async def until(self, num_tokens: int) -> None:
        assert await wait_until(lambda: len(self.tokens) >= num_tokens, 10, 0.005), (len(self.tokens), self.task)


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> AsyncIterator[Cluster]:
    async with start_cluster(target=UNHURRIED) as running:
        yield running


async def record_of(stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, session_id: str) -> list[int]:
    """The generated tokens that the store holds."""
    session = await stub.GetSession(pb.GetSessionRequest(session_id=session_id))
    return list(session.token_ids[session.prompt_len :])


async def test_the_sessions_own_request_takes_it_over_at_once_and_the_old_owner_stops(
    cluster: Cluster, redis_url: str
) -> None:
    whole = await cluster.generate(**{**new_request(max_tokens=80), "session_id": ""})
    async with node(cluster, redis_url) as other:
        request = new_request(max_tokens=80)
        old = Reader(cluster.stub, request)
        await old.until(10)
        new = Reader(other.stub, request)
        error = await asyncio.wait_for(old.task, 2)
        assert isinstance(error, Aborted)
        assert error.reason == "OWNERSHIP_LOST"
        assert await new.task is None
    assert new.tokens == whole.tokens
    assert old.tokens == whole.tokens[: len(old.tokens)]
    assert len(old.tokens) < 80
    assert await record_of(cluster.stub, request["session_id"]) == whole.tokens


async def test_another_request_waits_until_the_owners_heartbeat_is_gone(cluster: Cluster, redis_url: str) -> None:
    async with node(cluster, redis_url) as other:
        request = new_request(max_tokens=3000)
        reader = Reader(cluster.stub, request)
        await reader.until(1)
        next_turn = {**request, "request_id": str(uuid.uuid4()), "max_tokens": 3}
        refused = Reader(other.stub, next_turn)
        error = await refused.task
        assert isinstance(error, Aborted)
        assert error.reason == "SESSION_BUSY"
        with Redis.from_url(redis_url) as client:  # as if it had stood still for longer than its lease
            [heartbeat] = [
                key for key in client.scan_iter("outrider:coordinator:*") if not key.endswith(_id_of(other).encode())
            ]
            taken = None
            while taken is None or await taken.task is not None:  # it beats on: between two beats it looks dead
                client.delete(heartbeat)
                taken = Reader(other.stub, next_turn)
        assert len(taken.tokens) == 3
        lost = await reader.task
        assert isinstance(lost, Aborted)
        assert lost.reason == "OWNERSHIP_LOST"


def _id_of(other: Any) -> str:
    return str(other.running.coordinator._store.owner_id)


async def test_what_is_cut_off_from_the_store_for_longer_than_its_lease_loses_the_session(
    cluster: Cluster, redis_url: str
) -> None:
    port = int(redis_url.rsplit(":", 1)[1].split("/")[0])
    async with (
        proxied("127.0.0.1", port) as proxy,
        node(cluster, f"redis://127.0.0.1:{proxy.port}/0", redis_outage_after_s=0.1) as cut_off,
    ):
        request = new_request(max_tokens=3000)
        old = Reader(cut_off.stub, request)
        await old.until(5)
        proxy.silence()
        before = old.durable_len
        await old.until(len(old.tokens) + 20)  # it goes on without the store
        assert old.durable_len <= before + 5
        next_turn = {**request, "request_id": str(uuid.uuid4()), "max_tokens": 5}
        new = Reader(cluster.stub, next_turn)
        while await new.task is not None:
            await asyncio.sleep(0.1)
            new = Reader(cluster.stub, next_turn)
        record = await record_of(cluster.stub, request["session_id"])
        proxy.mend()
        error = await old.task
        assert isinstance(error, Aborted)
        assert error.reason == "OWNERSHIP_LOST"
        assert await record_of(cluster.stub, request["session_id"]) == record == new.tokens


async def test_a_coordinator_paused_for_longer_than_its_lease_writes_nothing_when_it_wakes(
    cluster: Cluster, redis_url: str
) -> None:
    assert cluster.draft is not None
    async with (
        coordinator_process(cluster.target.port, cluster.draft.port, redis_url) as (child, address),
        grpc.aio.insecure_channel(address) as channel,
    ):
        request = new_request(max_tokens=3000)
        old = Reader(coordinator_pb2_grpc.CoordinatorServiceStub(channel), request)
        await old.until(10)
        os.kill(child.pid, signal.SIGSTOP)
        next_turn = {**request, "request_id": str(uuid.uuid4()), "max_tokens": 20}
        new = Reader(cluster.stub, next_turn)
        while await new.task is not None:
            await asyncio.sleep(0.1)
            new = Reader(cluster.stub, next_turn)
        record = await record_of(cluster.stub, request["session_id"])
        os.kill(child.pid, signal.SIGCONT)
        error = await old.task
        assert isinstance(error, OutriderError)
        assert error.reason in ("OWNERSHIP_LOST", "STREAM_BROKEN")  # or its own keepalive gave the client up
        await asyncio.sleep(0.3)
        assert await record_of(cluster.stub, request["session_id"]) == record == new.tokens


async def test_a_session_closed_elsewhere_ends_its_generation_regularly(cluster: Cluster, redis_url: str) -> None:
    async with node(cluster, redis_url) as other:
        request = new_request(max_tokens=3000)
        reader = Reader(cluster.stub, request)
        await reader.until(5)
        await other.stub.CloseSession(pb.CloseSessionRequest(session_id=request["session_id"]))
        assert await reader.task is None
        assert reader.finished
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.stub.GetSession(pb.GetSessionRequest(session_id=request["session_id"]))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


MAX_LEN = 16
BEHIND_THE_END = {
    "a stop token": ({"stop_token_ids": [66]}, [65, 66, 67]),
    "EOS": ({"ignore_eos": False}, [65, SIMULATED_EOS, 67]),
    "a stop string": ({"stop": ["AB"]}, [65, 66, 67]),
    "the longest sequence": ({"prompt": "x" * (MAX_LEN - 2)}, [65, 66, 67]),
}


@pytest.mark.parametrize("num_recorded", [0, 1])
@pytest.mark.parametrize("name", BEHIND_THE_END)
async def test_adopted_tokens_must_not_go_on_behind_the_end(
    start_cluster: StartCluster, redis_url: str, name: str, num_recorded: int
) -> None:
    """Neither those of a record that is lost as a whole, nor those beyond the first recorded ones."""
    fields, adopted = BEHIND_THE_END[name]
    async with start_cluster(replace(TARGET, max_sequence_len=MAX_LEN)) as cluster:
        request = new_request(**{"max_tokens": 5, **fields})
        if num_recorded:
            resume = pb.ResumePoint(num_received_tokens=1, tokens_beyond_durable=adopted[:1])
            await cluster.generate(**request, resume=resume)
            await cut_back(redis_url, request["session_id"], len(request["prompt"]) + num_recorded)
        resume = pb.ResumePoint(num_received_tokens=3, tokens_beyond_durable=adopted)
        with pytest.raises(InvalidArgument) as caught:
            await cluster.generate(**request, resume=resume)
        assert (caught.value.reason, caught.value.field) == ("REQUEST_MISMATCH", "resume.tokens_beyond_durable")
        if not num_recorded:
            with pytest.raises(grpc.aio.AioRpcError):
                await cluster.stub.GetSession(pb.GetSessionRequest(session_id=request["session_id"]))


async def cut_back(redis_url: str, session_id: str, length: int) -> None:
    """Leaves of a record its first tokens, its generation unfinished: as if its owner had died behind them."""
    with Redis.from_url(redis_url) as client:
        base = f"outrider:{{{session_id}}}:"
        client.hdel(base + "meta", "finish_reason", "statistics", "reply")
        for name, width in (("tokens", 4), ("origins", 1)):
            client.set(base + name, client.getrange(base + name, 0, width * length - 1))


async def test_a_generation_goes_on_where_another_number_of_draft_tokens_is_the_default(
    cluster: Cluster, redis_url: str
) -> None:
    async with node(cluster, redis_url, num_draft_tokens="2") as other:
        request = new_request(max_tokens=60)
        old = Reader(cluster.stub, request)
        await old.until(5)
        new = Reader(other.stub, request)
        assert await new.task is None
    assert len(new.tokens) == 60
    assert old.tokens == new.tokens[: len(old.tokens)]


async def test_tokens_are_not_adopted_into_another_conversation(cluster: Cluster) -> None:
    resume = pb.ResumePoint(num_received_tokens=2, tokens_beyond_durable=[65, 66], num_prompt_tokens=40)
    with pytest.raises(OutriderError) as caught:
        await cluster.generate(**new_request(max_tokens=20), resume=resume)
    assert caught.value.reason == "TOKENS_LOST"


async def test_another_owners_session_is_as_if_it_were_not_there(cluster: Cluster, redis_url: str) -> None:
    request = new_request(max_tokens=3)
    await cluster.generate(**request)
    with Redis.from_url(redis_url) as client:
        client.hset(f"outrider:{{{request['session_id']}}}:meta", "owner_key", "somebody")
    with pytest.raises(NotFound):
        await cluster.generate(**request)
    for call, kind in (
        (cluster.stub.GetSession, pb.GetSessionRequest),
        (cluster.stub.CloseSession, pb.CloseSessionRequest),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(kind(session_id=request["session_id"]))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
