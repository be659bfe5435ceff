"""The load: both modes in turns, the same seeds in both, closed and open loops, sessions of several turns."""

from __future__ import annotations

import asyncio

import pytest
from outrider.v1 import coordinator_pb2 as pb

from services.cli.bench.load import Block, Load, LoadPlan
from services.cli.bench.sample import Failure, Mode, Sample
from services.cli.prompts import Conversation
from services.client import GenerateOptions, OutriderClient
from services.common.errors import InvalidArgument
from tests.fakes.coordinator import FakeCoordinator, play, serving, whole

CONVERSATIONS = tuple(Conversation(i, "qa", (f"first {i}", f"second {i}")) for i in range(4))
OPTIONS = GenerateOptions(max_tokens=6, temperature=0.0, num_draft_tokens=4)


async def run(fake: FakeCoordinator, plan: LoadPlan) -> list[Block]:
    async with serving(fake) as address, OutriderClient(address) as client:
        return [block async for block in Load(client, plan).run(CONVERSATIONS)]


async def test_modes_alternate_and_so_does_the_first_of_them():
    blocks = await run(FakeCoordinator(whole()), LoadPlan(OPTIONS))
    plain, speculative = Mode.PLAIN, Mode.SPECULATIVE
    assert [block.mode for block in blocks] == [plain, speculative, speculative, plain] * 2


async def test_a_prompt_has_the_same_seed_in_both_modes_and_its_own():
    fake = FakeCoordinator(whole())
    await run(fake, LoadPlan(OPTIONS, seed=10))
    seeds = [(r.num_draft_tokens, r.sampling.seed) for r in fake.requests]
    assert sorted(seeds) == [(k, 10 + i) for k in (0, 4) for i in range(4)]


async def test_samples_count_tokens_and_gaps():
    blocks = await run(FakeCoordinator(whole(6)), LoadPlan(OPTIONS, modes=(Mode.SPECULATIVE,)))
    sample = blocks[0].outcomes[0]
    assert isinstance(sample, Sample)
    assert sample.num_tokens == 6
    assert len(sample.itl_ns) == 2
    assert sample.num_decode_tokens == 4
    assert 0 < (sample.ttft_ns or 0) <= sample.total_ns <= blocks[0].wall_ns


async def test_a_closed_loop_keeps_as_many_running_as_asked():
    running, most = 0, 0
    enough = asyncio.Event()

    async def script(request: pb.GenerateRequest):
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 2:
            enough.set()
        await asyncio.wait_for(enough.wait(), 5)
        async for response in whole(2)(request):
            yield response
        running -= 1

    await run(FakeCoordinator(script), LoadPlan(OPTIONS, modes=(Mode.PLAIN,), concurrency=2))
    assert most == 2


async def test_an_open_loop_does_not_wait_for_answers():
    started, release = 0, asyncio.Event()

    async def script(request: pb.GenerateRequest):
        nonlocal started
        started += 1
        if started == len(CONVERSATIONS):
            release.set()
        await asyncio.wait_for(release.wait(), 5)
        async for response in whole(2)(request):
            yield response

    blocks = await run(FakeCoordinator(script), LoadPlan(OPTIONS, modes=(Mode.PLAIN,), rate=1000.0))
    assert sum(isinstance(o, Sample) for block in blocks for o in block.outcomes) == len(CONVERSATIONS)


async def test_all_turns_of_a_conversation_share_a_session():
    fake = FakeCoordinator(whole(2))
    await run(fake, LoadPlan(OPTIONS, modes=(Mode.PLAIN,), all_turns=True))
    texts = [request.chat.messages[0].content for request in fake.requests]
    assert texts[:2] == ["first 0", "second 0"]
    sessions = [request.session_id for request in fake.requests]
    assert sessions[0] == sessions[1]
    assert len(set(sessions)) == 4


async def test_a_failure_is_an_outcome_and_ends_its_conversation_only():
    refused = play(InvalidArgument("INVALID_PARAMETER", "no", field="top_p"), start=False)
    fake = FakeCoordinator(refused, whole(2))
    blocks = await run(fake, LoadPlan(OPTIONS, modes=(Mode.PLAIN,), all_turns=True))
    outcomes = [outcome for block in blocks for outcome in block.outcomes]
    assert isinstance(outcomes[0], Failure)
    assert len(outcomes) == 1 + 3 * 2


async def test_warm_up_is_short_and_raises_what_goes_wrong():
    fake = FakeCoordinator(whole(2))
    async with serving(fake) as address, OutriderClient(address) as client:
        await Load(client, LoadPlan(GenerateOptions(max_tokens=100), num_warmups=1)).warm_up(CONVERSATIONS)
        assert [request.max_tokens for request in fake.requests] == [8, 8]
        fake.scripts = [play(InvalidArgument("INVALID_PARAMETER", "no"), start=False)]
        with pytest.raises(InvalidArgument):
            await Load(client, LoadPlan(OPTIONS)).warm_up(CONVERSATIONS)
