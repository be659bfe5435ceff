from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common import wire
from services.common.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, OutriderError, Unavailable
from services.common.redis_client import MAX_CONNECTIONS
from services.common.service import wait_until
from services.coordinator.tokenizer import SimulatedTokenizer
from services.draft.server import running_draft
from services.target.server import running_target
from tests.integration.coordinator.conftest import DRAFT, TARGET, Cluster, StartCluster

SAMPLED = sampling_pb2.SamplingParams(temperature=1.0, seed=7)
EOS = 256


async def test_tokens_do_not_depend_on_the_draft(start_cluster: StartCluster) -> None:
    unhurried = replace(TARGET, simulated_step_ms=5.0)  # so that the draft is ready before the target has done it all
    fields = {"max_tokens": 40, "sampling": SAMPLED, "ignore_eos": True}
    async with start_cluster(target=unhurried) as cluster:
        results = [await cluster.generate(prompt="Hello", num_draft_tokens=k, **fields) for k in (0, 1, 4, 16)]
    assert len({tuple(result.tokens) for result in results}) == 1
    assert len(results[0].tokens) == 40
    assert all(result.finished.reason == pb.FINISH_REASON_LENGTH for result in results)
    assert results[0].finished.statistics.num_drafts == 0
    assert results[2].finished.statistics.num_accepted_tokens > 0


async def test_chunks_are_contiguous_and_statistics_add_up(cluster: Cluster) -> None:
    result = await cluster.generate(prompt="Hello", max_tokens=50, sampling=SAMPLED, ignore_eos=True)
    offset = 0
    for response in result.responses[1:]:
        if response.token_ids:
            assert response.token_offset == offset
            assert len(response.origins) == len(response.token_ids) == len(response.text_lens)
        offset += len(response.token_ids)
        assert response.durable_len >= offset or not response.token_ids
    statistics = result.finished.statistics
    origins = [origin for response in result.responses for origin in response.origins]
    assert statistics.num_generated_tokens == offset == 50
    assert statistics.num_prompt_tokens == 5
    assert origins.count(sampling_pb2.TOKEN_ORIGIN_DRAFT) == statistics.num_accepted_tokens
    assert sum(statistics.num_accepted_tokens_per_pos) == statistics.num_accepted_tokens
    assert len(statistics.overhead_ms) == statistics.num_drafts
    assert result.started.prompt_token_ids == list(b"Hello")


@pytest.mark.parametrize("method", ["REJECTION", "THRESHOLD", "COUPLED"])
async def test_every_verification_method_runs(cluster: Cluster, method: str) -> None:
    number = sampling_pb2.VerificationMethod.Value(f"VERIFICATION_METHOD_{method}")
    result = await cluster.generate(prompt="a", max_tokens=20, verification=number, sampling=SAMPLED, ignore_eos=True)
    assert len(result.tokens) == 20
    assert result.started.lossy == (method == "THRESHOLD")


async def test_a_stop_string_ends_the_text_before_it_and_the_record_behind_it(cluster: Cluster) -> None:
    free = await cluster.generate(prompt="a", max_tokens=60, sampling=SAMPLED, ignore_eos=True)
    text = free.text
    stop = next(text[i : i + 3] for i in range(20, 50) if text[i : i + 3].isascii())
    result = await cluster.generate(prompt="a", max_tokens=60, sampling=SAMPLED, ignore_eos=True, stop=[stop])
    assert result.text == text[: text.index(stop)]
    assert result.finished.reason == pb.FINISH_REASON_STOP
    assert result.tokens == free.tokens[: len(result.tokens)]
    session = await cluster.stub.GetSession(pb.GetSessionRequest(session_id=result.started.session_id))
    assert list(session.token_ids) == [*b"a", *result.tokens]


async def test_a_stop_token_ends_the_generation(cluster: Cluster) -> None:
    free = await cluster.generate(prompt="a", max_tokens=30, sampling=SAMPLED, ignore_eos=True)
    stop_id = free.tokens[12]
    result = await cluster.generate(prompt="a", max_tokens=30, sampling=SAMPLED, stop_token_ids=[stop_id])
    assert result.tokens[-1] == stop_id
    assert result.tokens == free.tokens[: free.tokens.index(stop_id) + 1]
    assert result.finished.reason == pb.FINISH_REASON_STOP


async def test_a_missing_seed_is_drawn_told_and_makes_the_output_repeatable(cluster: Cluster) -> None:
    sampling = sampling_pb2.SamplingParams(temperature=1.0)
    first = await cluster.generate(prompt="a", max_tokens=20, sampling=sampling, ignore_eos=True)
    sampling.seed = first.started.seed
    assert first.started.seed
    again = await cluster.generate(prompt="a", max_tokens=20, sampling=sampling, ignore_eos=True)
    assert again.tokens == first.tokens


async def test_log_probs_come_with_every_token(cluster: Cluster) -> None:
    result = await cluster.generate(prompt="a", max_tokens=12, log_probs=True, num_top_log_probs=3, ignore_eos=True)
    values = [value for response in result.responses for value in response.log_probs]
    tops = [top for response in result.responses for top in response.top_log_probs]
    assert len(values) == len(tops) == 12
    assert all(value <= 0 for value in values)
    assert [top.token_ids[0] for top in tops] == result.tokens  # the simulated target knows no other alternatives


async def test_a_next_chat_turn_sends_only_new_messages(cluster: Cluster) -> None:
    session_id = str(uuid.uuid4())
    message = pb.ChatMessage(role="user", content="one")
    first = await cluster.generate(
        session_id=session_id, chat=pb.ChatInput(messages=[message]), max_tokens=8, sampling=SAMPLED, ignore_eos=True
    )
    second = await cluster.generate(
        session_id=session_id,
        chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content="two")]),
        max_tokens=8,
        sampling=SAMPLED,
    )
    prompt = list(second.started.prompt_token_ids)
    assert bytes(i for i in prompt if i < 256).startswith(b"user: one" + b"assistant: ")
    assert bytes(i for i in prompt if i < 256).endswith(b"user: two" + b"assistant: ")
    recorded = [*first.started.prompt_token_ids, *first.tokens]
    common = next((i for i, (a, b) in enumerate(zip(recorded, prompt, strict=False)) if a != b), len(recorded))
    assert second.finished.statistics.num_replaced_tokens == len(recorded) - common


async def test_a_next_raw_turn_appends(cluster: Cluster) -> None:
    session_id = str(uuid.uuid4())
    first = await cluster.generate(session_id=session_id, prompt="one", max_tokens=5, ignore_eos=True)
    second = await cluster.generate(
        session_id=session_id, tokens=pb.TokenInput(token_ids=[1, 2]), max_tokens=5, ignore_eos=True
    )
    assert list(second.started.prompt_token_ids) == [*b"one", *first.tokens, 1, 2]
    assert second.finished.statistics.num_replaced_tokens == 0


async def test_a_finished_generation_repeats_its_tail(cluster: Cluster) -> None:
    request = {
        "session_id": str(uuid.uuid4()),
        "request_id": str(uuid.uuid4()),
        "prompt": "hi",
        "max_tokens": 20,
        "sampling": SAMPLED,
        "log_probs": True,
        "ignore_eos": True,
    }
    whole = await cluster.generate(**request)
    tail = await cluster.generate(**request, resume=pb.ResumePoint(num_received_tokens=15))
    assert tail.tokens == whole.tokens[15:]
    assert tail.finished.reason == whole.finished.reason
    assert tail.finished.statistics.num_rounds == whole.finished.statistics.num_rounds
    assert whole.text.endswith(tail.text)
    assert tail.responses[1].token_offset == 15
    again = await cluster.generate(**request)
    assert (again.tokens, again.text) == (whole.tokens, whole.text)


async def test_a_finished_tail_needs_no_worker(cluster: Cluster) -> None:
    request = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4()), "prompt": "hi", "max_tokens": 5}
    whole = await cluster.generate(**request, ignore_eos=True)
    await cluster.target.server.__aexit__(None, None, None)
    assert (await cluster.generate(**request, ignore_eos=True)).tokens == whole.tokens


async def test_a_repeated_request_id_with_other_parameters_is_a_mismatch(cluster: Cluster) -> None:
    request = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4()), "prompt": "hi"}
    await cluster.generate(**request, max_tokens=4)
    with pytest.raises(InvalidArgument) as caught:
        await cluster.generate(**request, max_tokens=5)
    assert (caught.value.reason, caught.value.field) == ("REQUEST_MISMATCH", "request_id")


async def test_a_client_that_goes_away_frees_its_sequences_and_may_resume(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=5.0)) as cluster:
        request = {
            "session_id": str(uuid.uuid4()),
            "request_id": str(uuid.uuid4()),
            "prompt": "hi",
            "max_tokens": 60,
            "sampling": SAMPLED,
            "ignore_eos": True,
        }
        call = cluster.stub.Generate(pb.GenerateRequest(**request))
        received: list[int] = []
        async for response in call:
            received += response.token_ids
            if len(received) >= 10:
                break
        call.cancel()
        assert cluster.draft is not None
        engines = (cluster.target.engine, cluster.draft.engine)
        assert await wait_until(lambda: all(engine.load.num_sequences == 0 for engine in engines), 1.0)
        session = await cluster.stub.GetSession(pb.GetSessionRequest(session_id=request["session_id"]))
        assert not session.running
        assert session.finish_reason == pb.FINISH_REASON_UNSPECIFIED
        rest = await cluster.generate(**request, resume=pb.ResumePoint(num_received_tokens=len(received)))
        whole = await cluster.generate(**{**request, "session_id": "", "request_id": ""})
        assert received + rest.tokens == whole.tokens


async def test_a_second_stream_takes_a_running_generation_over(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=10.0)) as cluster:
        request = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4()), "prompt": "hi", "max_tokens": 40}
        first = asyncio.create_task(cluster.generate(**request, sampling=SAMPLED, ignore_eos=True))
        running = cluster.coordinator.coordinator
        assert await wait_until(lambda: running.num_running == 1, 5)
        second = await cluster.generate(**request, sampling=SAMPLED, ignore_eos=True)
        assert len(second.tokens) == 40
        with pytest.raises(Aborted) as caught:
            await first
        assert caught.value.reason == "OWNERSHIP_LOST"


async def test_another_request_on_a_busy_session_is_refused(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=10.0)) as cluster:
        session_id = str(uuid.uuid4())
        call = cluster.stub.Generate(pb.GenerateRequest(session_id=session_id, prompt="a", max_tokens=200))
        await call.read()
        with pytest.raises(Aborted) as caught:
            await cluster.generate(session_id=session_id, prompt="b")
        assert caught.value.reason == "SESSION_BUSY"
        call.cancel()


async def test_closing_a_session_ends_its_generation_and_stays_closed(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=10.0)) as cluster:
        session_id = str(uuid.uuid4())
        running = asyncio.create_task(
            cluster.generate(session_id=session_id, prompt="a", max_tokens=300, ignore_eos=True)
        )
        coordinator = cluster.coordinator.coordinator
        assert await wait_until(lambda: coordinator.num_running == 1, 5)
        for _ in range(2):
            await cluster.stub.CloseSession(pb.CloseSessionRequest(session_id=session_id))
        assert (await running).finished.reason == pb.FINISH_REASON_CLOSED
        with pytest.raises(FailedPrecondition) as closed:
            await cluster.generate(session_id=session_id, prompt="b")
        assert closed.value.reason == "SESSION_CLOSED"
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await cluster.stub.GetSession(pb.GetSessionRequest(session_id=session_id))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND


async def test_tokens_beyond_the_record_are_adopted_not_generated_again(cluster: Cluster) -> None:
    request = {
        "session_id": str(uuid.uuid4()),
        "request_id": str(uuid.uuid4()),
        "prompt": "hi",
        "max_tokens": 12,
        "sampling": SAMPLED,
        "ignore_eos": True,
    }
    foreign = [65, 66, 67]
    resume = pb.ResumePoint(num_received_tokens=3, tokens_beyond_durable=foreign)
    result = await cluster.generate(**request, resume=resume)
    assert len(result.tokens) == 9
    session = await cluster.stub.GetSession(pb.GetSessionRequest(session_id=request["session_id"]))
    assert list(session.token_ids) == [*b"hi", *foreign, *result.tokens]


async def test_tokens_that_nobody_can_name_are_data_loss(cluster: Cluster) -> None:
    with pytest.raises(OutriderError) as caught:
        await cluster.generate(prompt="hi", resume=pb.ResumePoint(num_received_tokens=3))
    assert caught.value.reason == "TOKENS_LOST"


async def test_without_a_draft_the_target_decodes_alone(start_cluster: StartCluster) -> None:
    async with start_cluster(draft=None) as cluster:
        result = await cluster.generate(prompt="a", max_tokens=20, sampling=SAMPLED, ignore_eos=True)
        assert len(result.tokens) == 20
        assert result.finished.statistics.num_drafts == 0


async def test_a_draft_lost_midway_changes_nothing_but_the_speed(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=5.0)) as cluster:
        assert cluster.draft is not None
        fields = {"prompt": "a", "max_tokens": 60, "sampling": SAMPLED, "ignore_eos": True}
        running = asyncio.create_task(cluster.generate(**fields))
        engine = cluster.draft.engine
        assert await wait_until(lambda: engine.load.num_sequences == 1, 5)
        await cluster.draft.server.__aexit__(None, None, None)
        result = await running
        plain = await cluster.generate(**fields, num_draft_tokens=0)
        assert result.tokens == plain.tokens


async def test_a_late_draft_changes_nothing_but_the_speed(start_cluster: StartCluster) -> None:
    late = replace(DRAFT, simulated_token_ms=50.0)
    async with start_cluster(draft=late, propose_timeout_s=0.02) as cluster:
        fields = {"prompt": "a", "max_tokens": 30, "sampling": SAMPLED, "ignore_eos": True}
        result = await cluster.generate(**fields)
        plain = await cluster.generate(**fields, num_draft_tokens=0)
        assert result.tokens == plain.tokens
        assert result.finished.statistics.num_drafts == 0


async def test_a_draft_that_comes_back_is_used_again(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=5.0)) as cluster:
        assert cluster.draft is not None
        await cluster.draft.server.__aexit__(None, None, None)
        running = asyncio.create_task(cluster.generate(prompt="a", max_tokens=400, sampling=SAMPLED, ignore_eos=True))
        coordinator = cluster.coordinator.coordinator
        assert await wait_until(lambda: coordinator.num_running == 1, 5)
        async with running_draft(replace(DRAFT, port=cluster.draft.port)):
            result = await running
        assert result.finished.statistics.num_drafts > 0
        assert result.finished.statistics.num_rounds > result.finished.statistics.num_drafts


async def test_a_target_that_comes_back_costs_a_pause_and_no_token(start_cluster: StartCluster) -> None:
    slow = replace(TARGET, simulated_step_ms=5.0)
    async with start_cluster(target=slow) as cluster:
        fields = {"prompt": "a", "max_tokens": 60, "sampling": SAMPLED, "ignore_eos": True}
        whole = await cluster.generate(**fields)
        running = asyncio.create_task(cluster.generate(**fields))
        engine = cluster.target.engine
        assert await wait_until(lambda: engine.load.num_used_blocks > 0, 5)
        await cluster.target.server.__aexit__(None, None, None)
        async with running_target(replace(slow, port=cluster.target.port)):
            assert (await running).tokens == whole.tokens


async def test_a_lost_target_is_an_error_after_the_bound(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=10.0), target_retry_s=0.3) as cluster:
        running = asyncio.create_task(cluster.generate(prompt="a", max_tokens=500, ignore_eos=True))
        coordinator = cluster.coordinator.coordinator
        assert await wait_until(lambda: coordinator.num_running == 1, 5)
        await cluster.target.server.__aexit__(None, None, None)
        with pytest.raises(Unavailable) as caught:
            await running
        assert caught.value.reason == "NO_TARGET"
        with pytest.raises(Unavailable):
            await cluster.generate(prompt="a")


async def test_a_quiet_stream_gets_heartbeats(start_cluster: StartCluster) -> None:
    slow = replace(TARGET, simulated_step_ms=400.0)
    async with start_cluster(target=slow, draft=None, heartbeat_ms=50) as cluster:
        result = await cluster.generate(prompt="a", max_tokens=1)
        beats = [r for r in result.responses[1:] if not r.token_ids and not r.HasField("finished")]
        assert len(beats) >= 3


async def test_many_generations_share_the_streams(cluster: Cluster) -> None:
    fields = {"max_tokens": 24, "sampling": SAMPLED, "ignore_eos": True}
    together = await asyncio.gather(*[cluster.generate(prompt=f"p{i}", **fields) for i in range(16)])
    alone = await cluster.generate(prompt="p3", **fields)
    assert together[3].tokens == alone.tokens
    assert await wait_until(lambda: cluster.target.engine.load.num_sequences == 0, 1.0)


def stand_still(seconds: float) -> None:
    """The event loop with it."""
    time.sleep(seconds)


async def test_a_starved_coordinator_never_leaves_more_unread_than_a_worker_keeps_for_it(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_sequences, max_unread = 8, 800
    monkeypatch.setattr(wire, "MAX_UNREAD_RESULTS", max_unread)
    quick = replace(TARGET, max_sequences=num_sequences)
    caplog.set_level(logging.INFO, "services.coordinator")
    async with start_cluster(target=quick, draft=None, max_unread_tokens=10_000) as cluster:
        fields = {"max_tokens": 500, "sampling": SAMPLED, "ignore_eos": True}
        generations = [asyncio.create_task(cluster.generate(prompt="a", **fields)) for _ in range(num_sequences)]
        while not all(generation.done() for generation in generations):
            await asyncio.sleep(0.02)
            stand_still(0.2)  # the worker's engine goes on
        assert {len(generation.result().tokens) for generation in generations} == {500}
    assert [record.message for record in caplog.records if "lost its target" in record.message] == []


async def test_many_sessions_are_looked_at_and_closed_at_the_same_moment(cluster: Cluster) -> None:
    session_id = str(uuid.uuid4())
    whole = await cluster.generate(prompt="a", session_id=session_id, max_tokens=2)
    number = 2 * MAX_CONNECTIONS
    asked = [cluster.stub.GetSession(pb.GetSessionRequest(session_id=session_id)) for _ in range(number)]
    assert {tuple((await call).token_ids) for call in asked} == {(*b"a", *whole.tokens)}
    await asyncio.gather(
        *[cluster.stub.CloseSession(pb.CloseSessionRequest(session_id=session_id)) for _ in range(number)]
    )


async def test_too_many_generations_are_refused_with_a_time_to_retry(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=10.0), max_generations=1) as cluster:
        call = cluster.stub.Generate(pb.GenerateRequest(prompt="a", max_tokens=200, ignore_eos=True))
        await call.read()
        with pytest.raises(OutriderError) as caught:
            await cluster.generate(prompt="b")
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_ms
        call.cancel()


async def test_a_prompt_longer_than_the_model_takes_names_the_limit(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, max_sequence_len=64)) as cluster:
        with pytest.raises(InvalidArgument) as caught:
            await cluster.generate(prompt="x" * 64)
        assert (caught.value.reason, caught.value.field) == ("PROMPT_TOO_LONG", "prompt")
        assert "63" in caught.value.message
        result = await cluster.generate(prompt="x" * 60, max_tokens=100, ignore_eos=True)
        assert len(result.tokens) == 4


async def test_an_unknown_session_is_not_found(cluster: Cluster) -> None:
    for call in (cluster.stub.GetSession, cluster.stub.CloseSession):
        kind = pb.GetSessionRequest if call is cluster.stub.GetSession else pb.CloseSessionRequest
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(kind(session_id=str(uuid.uuid4())))  # type: ignore[operator]
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_draining_lets_generations_finish_and_takes_no_new_ones(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=10.0)) as cluster:
        running = asyncio.create_task(cluster.generate(prompt="a", max_tokens=20, ignore_eos=True))
        coordinator = cluster.coordinator.coordinator
        assert await wait_until(lambda: coordinator.num_running == 1, 5)
        drained = asyncio.create_task(coordinator.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable) as caught:
            await cluster.generate(prompt="b")
        assert caught.value.reason == "DRAINING"
        assert await drained
        assert len((await running).tokens) == 20


async def test_the_models_name_vocabulary_and_readiness_are_listed(cluster: Cluster) -> None:
    [model] = (await cluster.stub.ListModels(pb.ListModelsRequest())).models
    assert model.ready
    assert (model.vocab_size, model.drafter) == (257, "simulated")
    with pytest.raises(NotFound) as caught:
        await cluster.generate(prompt="a", model="other")
    assert (caught.value.reason, caught.value.field) == ("UNKNOWN_MODEL", "model")


async def test_a_target_with_another_vocabulary_is_refused_with_a_sentence(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = SimulatedTokenizer.__init__

    def other(self: SimulatedTokenizer) -> None:
        init(self)
        self.vocab_digest = "other"

    monkeypatch.setattr(SimulatedTokenizer, "__init__", other)
    async with start_cluster() as cluster:
        with pytest.raises(FailedPrecondition, match="differ in vocabulary") as caught:
            await cluster.generate(prompt="a")
        assert caught.value.reason == "VOCAB_MISMATCH"
