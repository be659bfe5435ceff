"""A second generation from one session: refused, or in a copy of its own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from outrider.v1 import coordinator_pb2 as pb

from services.client import GenerateOptions, OutriderClient
from services.common.errors import InvalidArgument, NotFound, ResourceExhausted
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster
from tests.integration.coordinator.test_takeover import Reader, new_request, record_of


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> AsyncIterator[Cluster]:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=5.0)) as running:
        yield running


def fork_of(request: dict[str, object], **fields: object) -> dict[str, object]:
    kept = {name: request[name] for name in ("session_id", "sampling", "ignore_eos")}
    return {**kept, "request_id": str(uuid.uuid4()), "fork": True, "max_tokens": 20, **fields}


async def test_a_fork_of_a_busy_session_runs_beside_it_and_neither_sees_the_other(cluster: Cluster) -> None:
    request = new_request(max_tokens=200)
    whole = await cluster.generate(**{**request, "session_id": "", "request_id": ""})
    reader = Reader(cluster.stub, request)
    await reader.until(30)
    fork = await cluster.generate(**fork_of(request, fork_len=12))
    assert fork.started.session_id != request["session_id"]
    assert list(fork.started.prompt_token_ids) == [*b"hi", *whole.tokens[:10]]
    assert await reader.task is None
    assert reader.tokens == whole.tokens
    assert await record_of(cluster.stub, request["session_id"]) == whole.tokens
    assert await record_of(cluster.stub, fork.started.session_id) == fork.tokens


async def test_forks_draw_other_noise_from_one_seed_and_greedy_ones_do_not_differ(cluster: Cluster) -> None:
    request = new_request(max_tokens=30)
    whole = await cluster.generate(**request)
    forks = [await cluster.generate(**fork_of(request, fork_len=12)) for _ in range(3)]
    continuations = {tuple(fork.tokens) for fork in forks} | {tuple(whole.tokens[10:])}
    assert len(continuations) == 4
    greedy = {"sampling": {"temperature": 0.0}}
    alike = [await cluster.generate(**fork_of(request, fork_len=12, **greedy)) for _ in range(2)]
    assert alike[0].tokens == alike[1].tokens


async def test_a_forks_request_may_be_sent_again_and_its_session_goes_on_as_a_fork(cluster: Cluster) -> None:
    request = new_request(max_tokens=30)
    await cluster.generate(**request)
    fork = fork_of(request, prompt=" and")
    first, again = await cluster.generate(**fork), await cluster.generate(**fork)
    assert (first.tokens, first.started.session_id) == (again.tokens, again.started.session_id)
    tail = await cluster.generate(**fork, resume=pb.ResumePoint(num_received_tokens=15))
    assert tail.tokens == first.tokens[15:]
    turn = {**request, "session_id": first.started.session_id, "request_id": str(uuid.uuid4()), "prompt": " so"}
    in_fork = await cluster.generate(**{**turn, "max_tokens": 20})
    prompt = list(in_fork.started.prompt_token_ids)
    assert prompt == [*first.started.prompt_token_ids, *first.tokens, *b" so"]
    outside = await cluster.generate(**new_request(tokens=pb.TokenInput(token_ids=prompt), max_tokens=20, prompt=None))
    assert in_fork.tokens != outside.tokens  # the noise is still the fork's


async def test_a_chats_fork_continues_its_conversation(cluster: Cluster) -> None:
    def chat(text: str) -> pb.ChatInput:
        return pb.ChatInput(messages=[pb.ChatMessage(role="user", content=text)])

    request = new_request(prompt=None, chat=chat("one"), max_tokens=8)
    await cluster.generate(**request)
    fork = await cluster.generate(**fork_of(request, chat=chat("two")))
    turn = await cluster.generate(**{**request, "request_id": str(uuid.uuid4()), "chat": chat("two")})
    assert list(fork.started.prompt_token_ids) == list(turn.started.prompt_token_ids)


async def test_what_cannot_be_forked_is_named(cluster: Cluster) -> None:
    request = new_request(max_tokens=5)
    with pytest.raises(NotFound) as unknown:
        await cluster.generate(**fork_of(request))
    assert unknown.value.reason == "UNKNOWN_SESSION"
    await cluster.generate(**request)
    with pytest.raises(InvalidArgument, match="has 7 tokens, not 8") as long:
        await cluster.generate(**fork_of(request, fork_len=8))
    assert long.value.field == "fork_len"


async def test_the_client_forks_and_knows_the_new_session(cluster: Cluster) -> None:
    options = GenerateOptions(max_tokens=10, seed=3, ignore_eos=True)
    async with OutriderClient(f"127.0.0.1:{cluster.coordinator.port}") as client:
        first = await client.complete("hi", options)
        generation = client.generate(None, options, session_id=first.session_id, fork=True, fork_len=2)
        fork = await generation.complete()
        assert fork.session_id == generation.session_id != first.session_id
        assert fork.prompt_token_ids == tuple(b"hi")
        await client.close_session(fork.session_id)
        assert (await client.get_session(first.session_id)).token_ids == (*b"hi", *first.token_ids)


async def test_a_client_with_too_many_sessions_or_tokens_is_refused_and_closing_one_makes_room(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(max_client_sessions=2, max_client_tokens=60) as cluster:
        first = await cluster.generate(**new_request(max_tokens=10))
        await cluster.generate(**new_request(max_tokens=10))
        with pytest.raises(ResourceExhausted) as many:
            await cluster.generate(**new_request(max_tokens=10))
        assert (many.value.reason, many.value.metadata["limit"]) == ("SESSION_LIMIT", "2")
        await cluster.stub.CloseSession(pb.CloseSessionRequest(session_id=first.started.session_id))
        await cluster.coordinator.coordinator._usage.flush()
        with pytest.raises(ResourceExhausted) as long:
            await cluster.generate(**new_request(max_tokens=59))
        assert (long.value.reason, long.value.metadata["limit"]) == ("TOKEN_LIMIT", "60")
        await cluster.generate(**new_request(max_tokens=10))
