"""Draft and target workers over real sockets, with simulated models."""

from __future__ import annotations

import asyncio
import time

import grpc.aio
import pytest
from outrider.v1 import target_pb2, worker_pb2, worker_pb2_grpc

from services.common import wire
from services.common.errors import Unavailable
from services.common.items import Close, Decode, Identity, Open, Opened, Propose, Proposed, Refused, Tokens, Verify
from services.common.rpc import channel_options
from services.common.rpc_errors import error_from_rpc
from services.common.service import wait_until
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.common.worker_server import BuiltWorker, Recipe, running_worker
from services.draft.config import DraftConfig
from services.draft.server import running_draft
from services.target.config import TargetConfig
from services.target.server import build, running_target
from services.target.servicer import TargetServicer
from tests.fakes.ports import held_port
from tests.unit.item_builders import simulated_continuation
from tests.worker_streams import draft_stream, target_stream

TARGET = TargetConfig(port=0, model="simulated", simulated_step_ms=1.0)
DRAFT = DraftConfig(port=0, drafter="simulated", simulated_token_ms=0.0, simulated_acceptance=1.0)
PREFIX = tuple(b"hello, world")


def identity(
    session: str = "s", *, epoch: int = 1, attempt: int = 1, round: int = 0, base_len: int = len(PREFIX)
) -> Identity:
    return Identity(session, epoch, attempt, round, base_len)


def opening(who: Identity, max_new_tokens: int = 100) -> Open:
    greedy = SamplingParams(temperature=0.0)
    return Open(who, PREFIX, len(PREFIX), frozenset({256}), greedy, VerificationMethod.COUPLED, max_new_tokens)


async def worker_info(port: int):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        return wire.info_from_proto(await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest()))


async def test_workers_describe_themselves() -> None:
    async with running_target(TARGET) as target, running_draft(DRAFT) as draft:
        target_info, draft_info = await worker_info(target.port), await worker_info(draft.port)
    assert (target_info.role, draft_info.role) == ("target", "draft")
    assert target_info.model is not None
    assert draft_info.model is not None
    assert target_info.model.vocab_digest == draft_info.model.vocab_digest != ""
    assert draft_info.drafter == "simulated"
    assert target_info.instance_id != draft_info.instance_id


async def test_a_lookup_drafter_has_no_vocabulary_of_its_own() -> None:
    async with running_draft(DraftConfig(port=0)) as draft:
        info = await worker_info(draft.port)
    assert (info.drafter, info.model) == ("ngram", None)


async def test_propose_and_verify_give_the_tokens_of_plain_decoding() -> None:
    async with running_target(TARGET) as target, running_draft(DRAFT) as draft, target_stream(target.port) as verify:
        await verify.send(opening(identity("plain")), Decode(identity("plain"), 20))
        plain = await verify.tokens()
        assert len(plain) == 20
        async with draft_stream(draft.port) as propose:
            await propose.send(opening(identity()))
            assert isinstance(await propose.next(), Opened)
            await verify.send(opening(identity()), Decode(identity(), 1))
            generated = commit = await verify.tokens()
            round = 0
            while len(generated) < 20:
                round += 1
                at = identity(round=round, base_len=len(PREFIX) + len(generated))
                await propose.send(Propose(at, commit, 4, round))
                proposed = await propose.next()
                assert isinstance(proposed, Proposed)
                assert len(proposed.proposal.token_ids) == 4
                await verify.send(Verify(at, proposed.proposal))
                commit = await verify.tokens()
                generated += commit
    assert round == 4, "an agreeing draft gets five tokens a round"
    assert generated[:20] == plain


@pytest.mark.parametrize(
    ("drafter", "smaller"),
    [("suffix", "suffix"), ("suffix,simulated", "suffix"), ("staged", "simulated"), ("ngram,staged", "suffix")],
)
async def test_every_drafter_gives_the_tokens_of_plain_decoding(drafter: str, smaller: str) -> None:
    config = DraftConfig(
        port=0, drafter=drafter, staged_drafter=smaller, model="simulated", simulated_token_ms=0.0, suffix_shared=True
    )
    expected = simulated_continuation(PREFIX, 30)
    async with running_target(TARGET) as target, running_draft(config) as draft:
        assert (await worker_info(draft.port)).drafter == drafter
        for session, is_known in (("first", False), ("again", "suffix" in drafter)):
            tokens, num_rounds = await generate(target.port, draft.port, session, 30)
            assert tokens == expected
            assert num_rounds < (12 if is_known or drafter != "suffix" else 30), "four drafted tokens a round"


async def generate(target_port: int, draft_port: int, session: str, num_tokens: int) -> tuple[tuple[int, ...], int]:
    """Tokens of a session, and how many rounds of up to 4 drafted tokens they took."""
    async with target_stream(target_port) as verify, draft_stream(draft_port) as propose:
        await propose.send(opening(identity(session)))
        assert isinstance(await propose.next(), Opened)
        await verify.send(opening(identity(session)), Decode(identity(session), 1))
        tokens = commit = await verify.tokens()
        num_rounds = 0
        while len(tokens) < num_tokens:
            num_rounds += 1
            at = identity(session, round=num_rounds, base_len=len(PREFIX) + len(tokens))
            await propose.send(Propose(at, commit, 4, num_rounds))
            proposed = await propose.next()
            assert isinstance(proposed, Proposed)
            await verify.send(Verify(at, proposed.proposal))
            commit = await verify.tokens()
            tokens += commit
        end = identity(session, base_len=len(PREFIX) + len(tokens))
        await propose.send(Propose(end, commit, 0, 0), Close(end))
    return tokens[:num_tokens], num_rounds


async def test_a_decode_ends_at_an_interrupt() -> None:
    config = TargetConfig(port=0, model="simulated", simulated_step_ms=5.0)
    async with running_target(config) as target, target_stream(target.port) as stream:
        await stream.send(opening(identity(), 10_000), Decode(identity(), 10_000))
        first = await stream.next()
        await stream.send(Decode(identity(base_len=len(PREFIX)), 0))
        rest = await stream.tokens()
        assert len(first.token_ids) == 1
        assert len(rest) < 1000
        end = len(PREFIX) + 1 + len(rest)
        await stream.send(Verify(identity(round=1, base_len=end), Proposal(1, ())))
        assert len(await stream.tokens()) == 1


async def test_a_bad_item_is_refused_alone() -> None:
    async with running_target(TARGET) as target, target_stream(target.port) as stream:
        await stream.send(Verify(identity("unknown"), Proposal(1, (1,))), opening(identity()), Decode(identity(), 1))
        results = [await stream.next(), await stream.next()]
        refused = next(result for result in results if isinstance(result, Refused))
        assert refused.error.reason == "UNKNOWN_SEQUENCE"
        assert any(isinstance(result, Tokens) for result in results)


async def test_older_work_is_refused_as_stale() -> None:
    async with running_target(TARGET) as target, target_stream(target.port) as stream:
        await stream.send(opening(identity(attempt=2)), Decode(identity(attempt=2), 1))
        await stream.tokens()
        await stream.send(opening(identity(attempt=1)))
        assert (await stream.next()).error.reason == "STALE"


async def test_a_stream_that_breaks_frees_its_sequences() -> None:
    async with running_target(TARGET) as target:
        async with target_stream(target.port) as stream:
            await stream.send(opening(identity(), 10_000), Decode(identity(), 10_000))
            await stream.next()
            assert target.engine.load.num_sequences == 1
        assert await wait_until(lambda: target.engine.load.num_used_blocks == 0, 1.0, 0.01)
        assert target.engine.load.num_sequences == 0


async def test_close_frees_the_sequence_within_a_second() -> None:
    async with running_target(TARGET) as target, target_stream(target.port) as stream:
        await stream.send(opening(identity(), 10_000), Decode(identity(), 10_000))
        await stream.next()
        await stream.send(Close(identity()))
        assert await wait_until(lambda: target.engine.load.num_used_blocks == 0, 1.0, 0.01)


async def test_draining_refuses_new_sequences_and_waits_for_the_open_one() -> None:
    async with running_target(TARGET) as target, target_stream(target.port) as stream:
        await stream.send(opening(identity()), Decode(identity(), 1))
        await stream.tokens()
        draining = asyncio.create_task(target.drain(10))
        assert await wait_until(lambda: target.engine.load.draining, 5, 0.01)
        await stream.send(opening(identity("late")), Decode(identity("late"), 1))
        refused = await stream.next()
        assert refused.error.reason == "DRAINING"
        assert not draining.done()
        at = identity(round=1, base_len=len(PREFIX) + 1)
        await stream.send(Decode(at, 3))
        results = []
        while sum(len(r.token_ids) for r in results) < 3:
            if isinstance(result := await stream.next(), Tokens):
                results.append(result)
        await stream.send(Close(at))
        assert await asyncio.wait_for(draining, 5)


async def test_a_worker_that_loads_answers_starting() -> None:
    started, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow_build() -> BuiltWorker:
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
        return build(TARGET)

    ports: list[int] = []
    recipe = Recipe("target", target_pb2.DESCRIPTOR.services_by_name["TargetService"], TargetServicer, slow_build)

    async def serve(port: int) -> None:
        async with running_worker(TargetConfig(port=port, model="simulated"), recipe) as running:
            ports.append(running.port)

    with held_port() as port:
        serving = asyncio.create_task(serve(port))
        await asyncio.wait_for(started.wait(), 10)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await worker_info(port)
        error = error_from_rpc(raised.value)
        assert (type(error), error.reason) == (Unavailable, "STARTING")
        assert error.retry_after_ms
        go_on.set()
        await asyncio.wait_for(serving, 10)
    assert ports == [port]


async def test_the_reported_total_covers_all_the_time_in_the_worker_but_not_the_network() -> None:
    async with running_target(TARGET) as target, target_stream(target.port) as stream:
        await stream.send(opening(identity()), Decode(identity(), 1))
        await stream.tokens()
        sent_ns = time.monotonic_ns()
        await stream.send(Verify(identity(round=1, base_len=len(PREFIX) + 1), Proposal(1, ())))
        result = await stream.next()
        wall_ns = time.monotonic_ns() - sent_ns
    timings = result.timings
    assert timings.forward_ns > 0  # a simulated step makes up for what the one before it overran
    assert timings.queue_ns + timings.forward_ns < timings.total_ns < wall_ns
