"""Drawing continuations for the distribution check: independent seeds, both modes, and a verdict that can fail."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from outrider.v1 import coordinator_pb2 as pb
from rich.console import Console

from services.cli.bench.distribution import DistributionCheck, draw_and_compare, verdict
from services.cli.bench.homogeneity import compare
from services.cli.bench.load import LoadPlan
from services.cli.prompts import Conversation
from services.client import GenerateOptions
from services.common.errors import InvalidArgument
from tests.fakes.coordinator import FakeCoordinator, finished, play, serving, started

PLAN = LoadPlan(GenerateOptions(max_tokens=1, temperature=1.0), concurrency=4, seed=100)
PROMPT = Conversation(1, "qa", ("Hello",))


async def lossy(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
    """Token 0 or 1 at even chances, but with speculation always 0."""
    speculative = not request.HasField("num_draft_tokens") or request.num_draft_tokens > 0
    token_id = 0 if speculative else (request.sampling.seed // 2) % 2
    yield started(request)
    yield pb.GenerateResponse(text="x", text_lens=[1], token_ids=[token_id], origins=[1], durable_len=1)
    yield finished(1)


async def test_speculation_that_changes_the_distribution_is_found():
    fake = FakeCoordinator(lossy)
    async with serving(fake) as address:
        check = await draw_and_compare(address, PROMPT, PLAN, 60, Console(quiet=True))
    assert (check.report.num_plain, check.report.num_speculative) == (60, 60)
    assert (check.num_draft_tokens, check.num_accepted_tokens) == (4 * 60, 3 * 60)
    assert not check.passed
    assert "DIFFER" in verdict(check)
    seeds = [request.sampling.seed for request in fake.requests]
    assert sorted(seeds) == list(range(100, 220))


async def test_a_failing_request_is_raised():
    refused = play(InvalidArgument("INVALID_PARAMETER", "no", field="top_p"), start=False)
    async with serving(FakeCoordinator(refused)) as address:
        with pytest.raises(InvalidArgument):
            await draw_and_compare(address, PROMPT, PLAN, 20, Console(quiet=True))


def test_a_check_that_saw_no_draft_token_does_not_pass():
    same = compare([(1,), (2,)] * 20, [(1,), (2,)] * 20)
    assert DistributionCheck(same, 10, 0).passed
    assert not DistributionCheck(same, 0, 0).passed
    assert "NOTHING WAS DRAFTED" in verdict(DistributionCheck(same, 0, 0))
