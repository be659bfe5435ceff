"""The client's stream: unbroken, without doubled tokens, whatever the server does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time

import pytest
from outrider.v1 import coordinator_pb2 as pb

from services.client import Chat, GenerateOptions, OutriderClient, RetryPolicy, TokenIds
from services.common.errors import Aborted, DataLoss, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from services.common.rpc import MAX_PUBLIC_MESSAGE_BYTES, GrpcServer, ServerLimits
from services.common.service import wait_until
from services.common.values import FinishReason, TokenOrigin, VerificationMethod
from tests.fakes.coordinator import WORDS, FakeCoordinator, finished, play, serving, started, tokens, whole
from tests.fakes.homes import session_at

QUICK = RetryPolicy(
    max_attempts=4,
    max_attempts_unreached=2,
    initial_backoff_s=0.001,
    max_backoff_s=0.002,
    heartbeat_timeout_s=0.15,
    first_message_timeout_s=2.0,
)
MOVED = Unavailable("MOVED", "this coordinator is going away")


@contextlib.asynccontextmanager
async def client_of(fake: FakeCoordinator):
    async with serving(fake) as address, OutriderClient(address, retry=QUICK) as client:
        yield client


async def test_chunks_carry_each_tokens_text_and_origin():
    async with client_of(FakeCoordinator(whole(4))) as client:
        chunks = [chunk async for chunk in client.generate("hi")]
    assert [(t.text, t.origin) for c in chunks for t in c.tokens] == [
        ("One", TokenOrigin.DRAFT),
        (" two", TokenOrigin.TARGET),
        (" three", TokenOrigin.DRAFT),
        (" four", TokenOrigin.TARGET),
    ]
    assert [c.offset for c in chunks] == [0, 2]


async def test_result_is_the_whole_generation():
    async with client_of(FakeCoordinator(whole(6))) as client:
        result = await client.complete("hi", GenerateOptions(seed=5))
    assert result.text == "".join(WORDS)
    assert result.token_ids == tuple(range(100, 106))
    assert result.prompt_token_ids == (7, 8)
    assert (result.finish_reason, result.seed, result.num_resumptions) == (FinishReason.LENGTH, 5, 0)
    assert result.statistics.acceptance_rate == 0.75
    assert result.statistics.mean_acceptance_length == 2.5


async def test_text_held_back_until_the_end_is_the_last_chunks_trailing_text():
    async with client_of(FakeCoordinator(play(tokens(0, 1), finished(1, text="...")))) as client:
        chunks = [chunk async for chunk in client.generate("hi")]
    assert [(c.text, c.trailing_text) for c in chunks] == [("One", ""), ("...", "...")]


async def test_result_before_the_end_raises():
    async with client_of(FakeCoordinator(whole())) as client:
        generation = client.generate("hi")
        with pytest.raises(RuntimeError, match="not finished"):
            _ = generation.result
        await generation.aclose()


async def test_a_broken_stream_resumes_with_the_same_identity_and_parameters():
    fake = FakeCoordinator(play(tokens(0, 2), MOVED), play(tokens(2, 4), finished(6)))
    async with client_of(fake) as client:
        result = await client.complete("hi", GenerateOptions(temperature=0.5, max_tokens=6))
    first, second = fake.requests
    assert second.HasField("resume")
    assert second.resume.num_received_tokens == 2
    second.ClearField("resume")
    assert second == first
    assert result.text == "".join(WORDS)
    assert result.num_resumptions == 1


async def test_a_resuming_client_sends_the_tokens_beyond_the_durable_ones():
    fake = FakeCoordinator(play(tokens(0, 3, durable_len=1), MOVED), play(tokens(3, 3), finished(6)))
    async with client_of(fake) as client:
        await client.complete("hi")
    assert list(fake.requests[1].resume.tokens_beyond_durable) == [101, 102]


async def test_tokens_that_the_server_repeats_are_dropped_with_their_text():
    fake = FakeCoordinator(play(tokens(0, 3), MOVED), play(tokens(1, 4), finished(5)))
    async with client_of(fake) as client:
        result = await client.complete("hi")
    assert result.token_ids == (100, 101, 102, 103, 104)
    assert result.text == "".join(WORDS[:5])


async def test_silence_is_a_broken_stream():
    fake = FakeCoordinator(play(tokens(0, 2), 5.0), play(tokens(2, 2), finished(4)))
    async with client_of(fake) as client:
        result = await client.complete("hi")
    assert result.token_ids == (100, 101, 102, 103)


async def test_heartbeats_keep_a_slow_stream_and_are_no_chunks():
    beats = [part for _ in range(4) for part in (0.06, pb.GenerateResponse())]
    fake = FakeCoordinator(play(*beats, tokens(0, 1), finished(1)))
    async with client_of(fake) as client:
        chunks = [chunk async for chunk in client.generate("hi")]
    assert len(chunks) == 1
    assert len(fake.requests) == 1


async def test_a_stream_without_an_end_is_resumed():
    fake = FakeCoordinator(play(tokens(0, 2)), play(tokens(2, 1), finished(3)))
    async with client_of(fake) as client:
        result = await client.complete("hi")
    assert result.token_ids == (100, 101, 102)


async def test_missing_tokens_are_data_loss():
    async with client_of(FakeCoordinator(play(tokens(2, 2), finished(4)))) as client:
        with pytest.raises(DataLoss, match="never arrived"):
            await client.complete("hi")


async def test_retries_are_bounded_and_the_last_error_is_raised():
    fake = FakeCoordinator(play(tokens(0, 1), MOVED), play(MOVED))
    async with client_of(fake) as client:
        with pytest.raises(Unavailable) as caught:
            await client.complete("hi")
    assert caught.value.reason == "MOVED"
    assert len(fake.requests) == QUICK.max_attempts


async def test_exhaustion_is_retried_only_when_the_server_says_when():
    busy = ResourceExhausted("QUEUE_FULL", "the queue is full", retry_after_ms=1)
    async with client_of(FakeCoordinator(play(busy, start=False), whole(2))) as client:
        assert (await client.complete("hi")).token_ids == (100, 101)
    never = ResourceExhausted("TOO_LONG_FOR_POOL", "longer than the pool")
    async with client_of(FakeCoordinator(play(never, start=False), whole(2))) as client:
        with pytest.raises(ResourceExhausted):
            await client.complete("hi")


async def test_a_server_with_too_many_calls_to_look_at_another_is_asked_again():
    """Its gRPC refuses them, without a reason and without a time to retry."""
    let_go = asyncio.Event()

    async def held(request: pb.GenerateRequest):
        for response in (started(request), tokens(0, 1)):
            yield response
        await let_go.wait()
        for response in (tokens(1, 1), finished(2)):
            yield response

    fake = FakeCoordinator(held, whole(2))
    limits = ServerLimits(max_concurrent_rpcs=1)
    server = GrpcServer("127.0.0.1", 0, limits=limits, reflect=False, stop_grace_s=0.0)
    server.add(pb.DESCRIPTOR.services_by_name["CoordinatorService"], fake)
    patient = RetryPolicy(max_attempts=50, max_attempts_unreached=50, initial_backoff_s=0.01, max_backoff_s=0.02)
    async with server, OutriderClient(f"127.0.0.1:{server.port}", retry=patient) as client:
        first = client.generate("hi")
        await anext(aiter(first))
        impatient = OutriderClient(f"127.0.0.1:{server.port}", retry=RetryPolicy(max_attempts_unreached=1))
        async with impatient:
            with pytest.raises(ResourceExhausted, match="oncurrent"):
                await impatient.complete("hi")
        second = asyncio.create_task(client.complete("hi"))
        let_go.set()
        assert (await second).token_ids == (100, 101)
        assert (await first.complete()).token_ids == (100, 101)


async def test_a_message_that_is_too_large_is_not_sent_again():
    fake = FakeCoordinator(whole(2))
    async with client_of(fake) as client:
        generation = client.generate("x" * (MAX_PUBLIC_MESSAGE_BYTES + 1))
        with pytest.raises(ResourceExhausted, match="larger than max") as caught:
            await generation.complete()
    assert "attempts" not in caught.value.message


async def test_a_busy_session_is_asked_for_again_when_the_server_says_when_and_not_for_ever():
    busy = Aborted("SESSION_BUSY", "another request is running", retry_after_ms=60)
    fake = FakeCoordinator(play(busy, start=False), whole(2))
    async with client_of(fake) as client:
        began = time.monotonic()
        assert (await client.complete("hi")).token_ids == (100, 101)
        assert time.monotonic() - began >= 0.06
    assert len(fake.requests) == 2
    fake = FakeCoordinator(play(busy, start=False))
    async with client_of(fake) as client:
        with pytest.raises(Aborted) as caught:
            await client.complete("hi")
    assert (caught.value.reason, caught.value.retry_after_ms) == ("SESSION_BUSY", 60)
    assert len(fake.requests) == QUICK.max_attempts_unreached


NO_TARGET = Unavailable("NO_TARGET", "no target worker", retry_after_ms=5)


async def test_a_generation_that_has_begun_outlasts_what_the_coordinator_says_will_pass():
    refusals = [play(NO_TARGET, start=False)] * (5 * QUICK.max_attempts)
    async with client_of(
        FakeCoordinator(play(tokens(0, 2), MOVED), *refusals, play(tokens(2, 2), finished(4)))
    ) as client:
        result = await client.complete("hi")
    assert (result.token_ids, result.num_resumptions) == ((100, 101, 102, 103), len(refusals) + 1)


async def test_it_does_so_for_the_policys_time_and_one_that_has_not_begun_does_not():
    begun = FakeCoordinator(play(tokens(0, 2), MOVED), play(NO_TARGET, start=False))
    policy = dataclasses.replace(QUICK, max_told_wait_s=0.1)
    async with serving(begun) as address, OutriderClient(address, retry=policy) as client:
        with pytest.raises(Unavailable, match="given up"):
            await client.complete("hi")
    assert QUICK.max_attempts < len(begun.requests) <= 0.1 / 0.005 + 3
    fresh = FakeCoordinator(play(NO_TARGET, start=False))
    async with client_of(fresh) as client:
        with pytest.raises(Unavailable, match="given up"):
            await client.complete("hi")
    assert len(fresh.requests) == QUICK.max_attempts_unreached


async def test_every_token_starts_the_count_of_failures_anew():
    breaks = [play(tokens(i, 1), MOVED) for i in range(6)]
    fake = FakeCoordinator(*breaks, play(finished(6)))
    async with client_of(fake) as client:
        result = await client.complete("hi")
    assert result.token_ids == tuple(range(100, 106))
    assert result.num_resumptions == 6 > QUICK.max_attempts


async def test_what_was_durable_once_stays_so():
    """A message that was overtaken, or a takeover from an older record, says less than is known."""
    less = play(tokens(0, 3, durable_len=2), tokens(3, 1, durable_len=1), MOVED)
    fake = FakeCoordinator(less, play(tokens(4, 1, durable_len=5), finished(5)))
    async with client_of(fake) as client:
        chunks = [chunk async for chunk in client.generate("hi")]
    assert list(fake.requests[1].resume.tokens_beyond_durable) == [102, 103]
    assert [chunk.durable_len for chunk in chunks] == [2, 2, 5]


async def test_refusals_are_raised_as_their_types_and_never_retried():
    error = Aborted("SESSION_BUSY", "another request is running")
    fake = FakeCoordinator(play(error, start=False))
    async with client_of(fake) as client:
        with pytest.raises(Aborted) as caught:
            await client.complete("hi")
    assert caught.value.reason == "SESSION_BUSY"
    assert len(fake.requests) == 1


async def test_another_address_takes_over():
    dying, healthy = FakeCoordinator(play(tokens(0, 2), MOVED)), FakeCoordinator(play(tokens(2, 2), finished(4)))
    async with (
        serving(dying) as first,
        serving(healthy) as second,
        OutriderClient(first, second, retry=QUICK) as client,
    ):
        result = await client.complete("hi", session_id=session_at(0))
    assert result.token_ids == (100, 101, 102, 103)
    assert [len(dying.requests), len(healthy.requests)] == [1, 1]


async def test_nothing_listening_is_unavailable():
    async with serving(FakeCoordinator(whole())) as address:
        pass
    async with OutriderClient(address, retry=QUICK) as client:
        with pytest.raises(Unavailable):
            await client.complete("hi")


async def test_leaving_the_stream_early_cancels_the_call():
    fake = FakeCoordinator(play(tokens(0, 1), 30.0))
    async with client_of(fake) as client:
        generation = client.generate("hi")
        async with contextlib.aclosing(generation):
            async for _ in generation:
                break
        async with asyncio.timeout(5):
            await fake.cancelled.wait()


async def test_a_reader_that_is_cancelled_between_two_chunks_ends_the_call_at_once():
    fake = FakeCoordinator(play(tokens(0, 1), 30.0))
    async with client_of(fake) as client:
        reading = asyncio.Event()

        async def read() -> None:
            async for _ in client.generate("hi"):
                reading.set()
                await asyncio.sleep(30.0)

        task = asyncio.create_task(read())
        await reading.wait()
        gc.disable()  # what it would find later must not be needed
        try:
            task.cancel()
            async with asyncio.timeout(2):
                await fake.cancelled.wait()
        finally:
            gc.enable()


async def test_a_generation_between_two_tries_ends_when_the_client_is_closed():
    fake = FakeCoordinator(play(MOVED), whole())
    patient = dataclasses.replace(QUICK, initial_backoff_s=0.3, max_backoff_s=0.3)
    async with serving(fake) as address:
        client = OutriderClient(address, retry=patient)
        reading = asyncio.create_task(client.complete("hi"))
        places = client._connections._connections
        assert await wait_until(lambda: bool(fake.requests) and not places[0].num_calls, 5)
        await client.close()
        with pytest.raises(RuntimeError, match="closed"):
            await reading
    assert len(fake.requests) == 1


async def test_prompts_and_options_reach_the_wire():
    fake = FakeCoordinator(whole(2))
    options = GenerateOptions(
        temperature=0.0, stop=("a", "b"), num_draft_tokens=0, verification=VerificationMethod.REJECTION, top_p=0.5
    )
    async with client_of(fake) as client:
        await client.complete("plain", options)
        await client.complete(Chat.of("user", system="system"), options)
        await client.complete(TokenIds((1, 2)), options)
    plain, chat, ids = fake.requests
    assert plain.prompt == "plain"
    assert [(m.role, m.content) for m in chat.chat.messages] == [("system", "system"), ("user", "user")]
    assert list(ids.tokens.token_ids) == [1, 2]
    assert plain.sampling.HasField("temperature")
    assert plain.HasField("num_draft_tokens")
    assert list(plain.stop) == ["a", "b"]
    assert plain.sampling.top_p == 0.5


@pytest.mark.parametrize(
    "options", [GenerateOptions(top_k=-1), GenerateOptions(max_tokens=-1), GenerateOptions(seed=-1)]
)
async def test_values_that_no_field_can_hold_are_invalid_arguments(options):
    async with OutriderClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidArgument):
            client.generate("hi", options)


async def test_text_that_is_no_unicode_is_an_invalid_argument():
    async with OutriderClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidArgument):
            client.generate("\ud800")


async def test_a_session_that_must_exist_must_be_named_and_its_loss_is_told_at_once():
    lost = NotFound("UNKNOWN_SESSION", "no session s", field="session_id")
    fake = FakeCoordinator(play(lost, start=False))
    async with client_of(fake) as client:
        with pytest.raises(InvalidArgument, match="needs session_id") as caught:
            client.generate("hi", continue_session=True)
        assert caught.value.field == "continue_session"
        with pytest.raises(NotFound):
            await client.complete("hi", session_id="s", continue_session=True)
    assert [request.continue_session for request in fake.requests] == [True]


async def test_sessions_and_models():
    async with client_of(FakeCoordinator(whole())) as client:
        record = await client.get_session("known")
        await client.close_session("known")
        models = await client.list_models()
        with pytest.raises(NotFound) as caught:
            await client.get_session("other")
    assert (record.token_ids, record.prompt_len, record.finish_reason) == ((7, 8, 100), 2, None)
    assert [(m.name, m.ready) for m in models] == [("fake", True)]
    assert (caught.value.reason, caught.value.field) == ("UNKNOWN_SESSION", "session_id")
