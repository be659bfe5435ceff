"""Drafts that lie, and workers that come back otherwise than they were: never the client's trouble."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2, worker_pb2

from services.common import wire
from services.common.errors import InvalidArgument
from services.common.items import Open
from services.common.service import wait_until
from services.common.values import Proposal, SparseRow
from services.draft.config import DraftConfig
from services.draft.server import running_draft
from services.engine.drafters.base import Draft
from services.target.config import TargetConfig
from services.target.server import running_target
from tests.integration.coordinator.conftest import DRAFT, TARGET, UNHURRIED_MS, Cluster, StartCluster
from tests.tiny_models import save_model

SAMPLED = sampling_pb2.SamplingParams(temperature=1.0, seed=7)
NAN = float("nan")

Lie = Callable[[Proposal], Proposal]


def ids_outside_the_vocabulary(honest: Proposal) -> Proposal:
    return replace(honest, token_ids=(*honest.token_ids[:1], 2**32 - 1, 257))


def more_tokens_than_asked(honest: Proposal) -> Proposal:
    return replace(honest, token_ids=honest.token_ids * 20)


def another_proposals_id(honest: Proposal) -> Proposal:
    return replace(honest, proposal_id=honest.proposal_id + 1)


def impossible_rows(honest: Proposal) -> Proposal:
    row = SparseRow((2**32 - 1, 3), (NAN, -1.0))
    return replace(honest, rows=(row,) * len(honest.token_ids))


def other_tokens(honest: Proposal) -> Proposal:
    return replace(honest, token_ids=tuple((token + 1) % 256 for token in honest.token_ids))


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lie], list[int]]:
    """Makes every draft lie so; returns a list that grows by the length of each lie told."""

    def tell(lie: Lie) -> list[int]:
        told, honest = [], Draft.proposal

        def lying(draft: Draft, proposal_id: int) -> Proposal:
            proposal = honest(draft, proposal_id)
            told.append(len(proposal.token_ids))
            return lie(proposal)

        monkeypatch.setattr(Draft, "proposal", lying)
        return told

    return tell


@pytest.mark.parametrize(
    "lie", [ids_outside_the_vocabulary, more_tokens_than_asked, another_proposals_id, impossible_rows, other_tokens]
)
@pytest.mark.parametrize("method", ["COUPLED", "REJECTION"])
async def test_a_lying_draft_changes_nothing_but_the_speed(
    start_cluster: StartCluster, tell: Callable[[Lie], list[int]], lie: Lie, method: str
) -> None:
    told = tell(lie)
    slow = replace(TARGET, simulated_step_ms=5.0)
    async with start_cluster(target=slow, propose_timeout_s=0.1) as cluster:
        fields = {
            "prompt": "a",
            "max_tokens": 30,
            "sampling": SAMPLED,
            "ignore_eos": True,
            "verification": sampling_pb2.VerificationMethod.Value(f"VERIFICATION_METHOD_{method}"),
        }
        plain = await cluster.generate(**fields, num_draft_tokens=0)
        assert (await cluster.generate(**fields, num_draft_tokens=4)).tokens == plain.tokens
        assert sum(told) > 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("tiny"), seed=3))


def running_tiny(start: StartCluster, tiny: str) -> contextlib.AbstractAsyncContextManager[Cluster]:
    """A real target, and itself for a draft."""
    target = TargetConfig(port=0, model=tiny, num_blocks=128, threads=1)
    draft = DraftConfig(port=0, model=tiny, drafter="model", num_blocks=128, threads=1)
    return start(target, draft, tokenizer=tiny, min_propose_ms=UNHURRIED_MS)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
async def test_a_real_targets_coupled_tokens_are_its_own_whatever_a_lying_draft_says(
    start_cluster: StartCluster, tell: Callable[[Lie], list[int]], tiny: str, temperature: float
) -> None:
    told = tell(other_tokens)
    async with running_tiny(start_cluster, tiny) as cluster:
        sampling = sampling_pb2.SamplingParams(temperature=temperature, seed=7)
        fields = {"prompt": "the sailors sing", "max_tokens": 24, "sampling": sampling, "ignore_eos": True}
        plain = await cluster.generate(**fields, num_draft_tokens=0)
        for num_draft_tokens in (1, 4, 8):
            lied_to = await cluster.generate(**fields, num_draft_tokens=num_draft_tokens)
            assert lied_to.tokens == plain.tokens
            assert lied_to.finished.statistics.num_accepted_tokens < lied_to.finished.statistics.num_draft_tokens
        assert sum(told) > 0


async def test_a_real_target_replaces_impossible_rows_and_says_so(
    start_cluster: StartCluster, tell: Callable[[Lie], list[int]], tiny: str
) -> None:
    told = tell(impossible_rows)
    async with running_tiny(start_cluster, tiny) as cluster:
        result = await cluster.generate(
            prompt="the sailors sing",
            max_tokens=24,
            sampling=SAMPLED,
            ignore_eos=True,
            num_draft_tokens=4,
            verification=sampling_pb2.VERIFICATION_METHOD_REJECTION,
        )
        assert len(result.tokens) == 24
        assert result.finished.statistics.num_replaced_rows > 0
        assert sum(told) > 0


async def test_a_draft_that_comes_back_with_a_lower_limit_is_used_again(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=5.0)) as cluster:
        assert cluster.draft is not None
        request = pb.GenerateRequest(prompt="a", max_tokens=5000, ignore_eos=True, num_draft_tokens=8)
        call = cluster.stub.Generate(request)
        engine = cluster.draft.engine
        assert await wait_until(lambda: engine.load.num_sequences == 1, 5)
        await cluster.draft.server.__aexit__(None, None, None)
        async with running_draft(replace(DRAFT, port=cluster.draft.port, max_draft_tokens=2)) as smaller:
            assert await wait_until(lambda: smaller.engine.load.num_sequences == 1, 5)
            num_drafted = 0
            async with asyncio.timeout(5):
                while num_drafted < 50:
                    num_drafted += list((await call.read()).origins).count(sampling_pb2.TOKEN_ORIGIN_DRAFT)
                    if not smaller.engine.load.num_sequences:
                        num_drafted = 0
        call.cancel()


async def test_a_sequence_that_outgrows_its_draft_is_decoded_by_the_target_alone(start_cluster: StartCluster) -> None:
    short = replace(DRAFT, max_sequence_len=40, simulated_acceptance=1.0)
    async with start_cluster(target=replace(TARGET, simulated_step_ms=2.0), draft=short) as cluster:
        assert cluster.draft is not None
        fields = {"prompt": "a", "max_tokens": 200, "sampling": SAMPLED, "ignore_eos": True}
        plain = await cluster.generate(**fields, num_draft_tokens=0)
        running = asyncio.create_task(cluster.generate(**fields))
        engine = cluster.draft.engine
        assert await wait_until(lambda: engine.load.num_sequences == 1, 5, 0.001)
        assert await wait_until(lambda: engine.load.num_sequences == 0, 5, 0.001)
        assert not running.done()
        result = await running
        assert result.tokens == plain.tokens
        assert 0 < result.finished.statistics.num_accepted_tokens < 40


async def test_a_session_too_long_for_the_target_that_came_back_is_refused_and_disturbs_nobody(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=5.0), target_timeout_s=1.0) as cluster:
        request = {
            "session_id": str(uuid.uuid4()),
            "request_id": str(uuid.uuid4()),
            "prompt": "x" * 60,
            "max_tokens": 100,
            "ignore_eos": True,
        }
        call = cluster.stub.Generate(pb.GenerateRequest(**request))
        await call.read()
        await call.read()
        call.cancel()
        await cluster.target.server.__aexit__(None, None, None)
        async with running_target(replace(TARGET, port=cluster.target.port, max_sequence_len=32)):
            await wait_until(lambda: cluster.coordinator.placement.served[0].max_sequence_len == 32, 5)
            with pytest.raises(InvalidArgument) as caught:
                await cluster.generate(**request)
            assert (caught.value.reason, caught.value.field) == ("PROMPT_TOO_LONG", "prompt")
            assert len((await cluster.generate(prompt="a", max_tokens=3, ignore_eos=True)).tokens) == 3


async def test_an_item_that_cannot_be_sent_breaks_the_stream_rather_than_hang_it(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, defects = wire.open_to_proto, [ValueError("out of range")]

    def flawed(item: Open) -> list[worker_pb2.OpenItem]:
        if item.log_probs and defects:  # the draft is never asked for them
            raise defects.pop()
        return encode(item)

    monkeypatch.setattr(wire, "open_to_proto", flawed)
    async with start_cluster() as cluster, asyncio.timeout(10):
        result = await cluster.generate(prompt="a", max_tokens=5, ignore_eos=True, log_probs=True)
        assert len(result.tokens) == 5
    assert not defects
