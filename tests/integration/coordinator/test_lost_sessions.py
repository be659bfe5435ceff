"""Sessions whose record is gone, by expiry or by Redis' loss: what their next turns and running generations get."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
from outrider.v1 import coordinator_pb2 as pb
from redis import Redis

from services.common.errors import InvalidArgument, NotFound
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster
from tests.integration.coordinator.test_takeover import Reader, new_request


def turn(session_id: str, text: str, **fields: Any) -> dict[str, Any]:
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content=text)])
    return {"session_id": session_id, "chat": chat, "max_tokens": 5, "ignore_eos": True, **fields}


def lose_all(redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        client.flushall()


async def test_a_turn_that_continues_a_lost_session_is_not_found_and_one_that_may_begin_it_begins_it(
    cluster: Cluster, redis_url: str
) -> None:
    session_id = str(uuid.uuid4())
    with pytest.raises(NotFound):
        await cluster.generate(**turn(session_id, "My name is Ada.", continue_session=True))
    await cluster.generate(**turn(session_id, "My name is Ada."))
    second = await cluster.generate(**turn(session_id, "What is it?", continue_session=True))
    assert b"Ada" in bytes(i for i in second.started.prompt_token_ids if i < 256)
    lose_all(redis_url)
    with pytest.raises(NotFound) as caught:
        await cluster.generate(**turn(session_id, "And now?", continue_session=True))
    assert (caught.value.reason, caught.value.field) == ("UNKNOWN_SESSION", "session_id")
    with pytest.raises(NotFound):
        await cluster.generate(**turn(session_id, "And now?", continue_session=True, resume=pb.ResumePoint()))
    anew = await cluster.generate(**turn(session_id, "And now?"))
    assert b"Ada" not in bytes(i for i in anew.started.prompt_token_ids if i < 256)
    await cluster.generate(**turn(session_id, "And now?", continue_session=True))


async def test_a_client_that_has_received_tokens_resumes_though_the_session_is_lost(
    cluster: Cluster, redis_url: str
) -> None:
    request = {**new_request(max_tokens=20), "continue_session": True}
    whole = await cluster.generate(**{**request, "continue_session": False})
    lose_all(redis_url)
    resume = pb.ResumePoint(num_received_tokens=8, tokens_beyond_durable=whole.tokens[:8], num_prompt_tokens=2)
    assert (await cluster.generate(**request, resume=resume)).tokens == whole.tokens[8:]


async def test_a_fork_continues_its_source_and_is_a_new_session_itself(cluster: Cluster) -> None:
    first = await cluster.generate(**turn(str(uuid.uuid4()), "one"))
    forked = await cluster.generate(**turn(first.started.session_id, "two", fork=True, continue_session=True))
    assert forked.started.session_id != first.started.session_id


async def test_a_session_to_continue_must_be_named(cluster: Cluster) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await cluster.generate(**turn("", "one", continue_session=True))
    assert caught.value.field == "continue_session"


async def test_a_record_that_expires_under_its_generation_is_written_again_whole(
    start_cluster: StartCluster, redis_url: str
) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=5.0)) as cluster:
        request = new_request(max_tokens=150, log_probs=True)
        whole = await cluster.generate(**{**request, "session_id": "", "request_id": ""})
        reader = Reader(cluster.stub, request)
        await reader.until(20)
        with Redis.from_url(redis_url) as client:
            keys = [key.decode() for key in client.scan_iter(f"outrider:{{{request['session_id']}}}:*")]
            assert len(keys) == 4
            assert all(client.pexpire(key, 1) for key in keys)  # as when Redis' clock leaps over the idle time
            assert not reader.finished
            assert await reader.task is None
            assert reader.tokens == whole.tokens
            assert reader.durable_len == 150
            assert all(client.ttl(key) > 60 for key in keys)
        session = await cluster.stub.GetSession(pb.GetSessionRequest(session_id=request["session_id"]))
        assert list(session.token_ids) == [*b"hi", *whole.tokens]
        assert (session.finish_reason, session.running) == (pb.FINISH_REASON_LENGTH, False)
        again = await cluster.generate(**request)
        assert [value for response in again.responses for value in response.log_probs] == [
            value for response in whole.responses for value in response.log_probs
        ]
