"""How a generation ends; what it does while it runs is tested with whole clusters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from services.common.errors import Aborted, OutriderError
from services.common.session_record import RecordLost, Write
from services.common.values import FinishReason, SamplingParams, VerificationMethod
from services.coordinator.committer import Committer
from services.coordinator.draft_length import FixedLength
from services.coordinator.generation import Generation, Routes, Timeouts
from services.coordinator.journal import Journal, RecordCopy
from services.coordinator.output import Chunk, Output
from services.coordinator.plan import GenerationPlan
from services.coordinator.propose_deadline import ProposeDeadline
from services.coordinator.statistics import StatisticsCollector
from services.coordinator.tokenizer import SimulatedTokenizer
from services.coordinator.trim import EndRules, Trimmer
from services.coordinator.worker_link import TARGET_CODEC, WorkerLink
from tests.fakes.fixed_route import FixedRoute

TAKEN_OVER = Aborted("OWNERSHIP_LOST", "taken over")


class SlowStore:
    """Stores commits once it may."""

    def __init__(self) -> None:
        self.was_asked, self.may_answer = asyncio.Event(), asyncio.Event()
        self.stored: list[Write] = []

    async def write_all(self, writes: Sequence[Write]) -> list[OutriderError | RecordLost | None]:
        self.was_asked.set()
        await self.may_answer.wait()
        self.stored += writes
        return [None] * len(writes)


def new_generation(
    committer: Committer, output: Output, finish: FinishReason | None = None, route: FixedRoute | None = None
) -> Generation:
    plan = GenerationPlan(
        session_id="s",
        lease_epoch=1,
        prompt_len=1,
        max_len=10,
        end_token_ids=frozenset(),
        sampling=SamplingParams(),
        verification=VerificationMethod.COUPLED,
        num_draft_tokens=0,
        log_probs=False,
        num_top_log_probs=0,
        vocab_size=257,
    )
    text = SimulatedTokenizer().text_stream(include_special_tokens=False, context=())
    trimmer = Trimmer(EndRules(frozenset(), frozenset(), (), 1), text)
    if finish:
        trimmer.trim((65,), ())
    return Generation(
        plan,
        [1, 65],
        routes=Routes(route or FixedRoute(WorkerLink("127.0.0.1:1", TARGET_CODEC)), None),
        trimmer=trimmer,
        journal=Journal(committer, "s", 1, RecordCopy.of((1, 65), b"\0\1", b"", {})),
        output=output,
        statistics=StatisticsCollector(arrived_ns=0, lossy=False, num_replaced_tokens=0),
        timeouts=Timeouts(ProposeDeadline(1.0), 1.0, 1.0),
        length=FixedLength(0),
        finish=finish,
    )


async def chunks_of(output: Output) -> list[Chunk]:
    return [chunk async for chunk in output]


@pytest.mark.parametrize("error", [TAKEN_OVER, None])
async def test_a_generation_stopped_before_its_first_step_ends_its_stream_and_releases_its_record(
    error: Aborted | None,
) -> None:
    store, output = SlowStore(), Output(max_unread_tokens=16, slow_client_s=1.0)
    store.may_answer.set()
    committer = Committer(store, outage_after_s=60)
    committer.start()
    route = FixedRoute(WorkerLink("127.0.0.1:1", TARGET_CODEC))
    generation = new_generation(committer, output, route=route)
    generation.start()
    await generation.stop(error)
    assert route.closed
    async with asyncio.timeout(1):
        await generation.stop(error)
        if error:
            with pytest.raises(Aborted):
                await chunks_of(output)
        else:
            assert (await chunks_of(output))[-1].finish is FinishReason.CLOSED
    assert [commit.fields for commit in store.stored] == [{"running": "0"}]
    await committer.aclose()


async def test_who_waits_for_the_end_may_be_cancelled_and_the_end_stays_what_it_is() -> None:
    store, output = SlowStore(), Output(max_unread_tokens=16, slow_client_s=1.0)
    committer = Committer(store, outage_after_s=60)
    committer.start()
    generation = new_generation(committer, output, FinishReason.LENGTH)
    generation.start()
    async with asyncio.timeout(1):
        await store.was_asked.wait()
    waiting = asyncio.create_task(generation.stop(TAKEN_OVER))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    store.may_answer.set()
    async with asyncio.timeout(1):
        assert (await chunks_of(output))[-1].finish is FinishReason.LENGTH
    await committer.aclose()


async def test_who_stops_a_generation_that_fails_by_itself_waits_for_what_it_still_writes() -> None:
    store, output = SlowStore(), Output(max_unread_tokens=16, slow_client_s=1.0)
    committer = Committer(store, outage_after_s=60)
    committer.start()
    generation = new_generation(committer, output)
    generation.start()
    async with asyncio.timeout(5):
        await store.was_asked.wait()
        stopping = asyncio.create_task(generation.stop(TAKEN_OVER))
        await asyncio.wait([stopping], timeout=0.1)
        assert not stopping.done()
        store.may_answer.set()
        await stopping
    assert [commit.fields["running"] for commit in store.stored] == ["0"]
    await committer.aclose()
