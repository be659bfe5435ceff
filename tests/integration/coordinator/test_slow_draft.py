"""A draft that becomes too slow for what its rounds are worth, and quick again, over real sockets: counts, no times."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common.service import wait_until
from services.engine.drafters.simulated import SimulatedDraft
from services.engine.step import Sampled, Work
from tests.integration.coordinator.conftest import DRAFT, TARGET, StartCluster, StartMany

STEADY = replace(TARGET, simulated_step_ms=10.0)
SAMPLED = sampling_pb2.SamplingParams(temperature=1.0, seed=7)
SLOW_MS = 250.0


class Slowness:
    """What a step of any simulated draft takes; `set_ms` at any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set_ms = 1.0
        step = SimulatedDraft.step

        def slowed(draft: SimulatedDraft, works: list[Work]) -> list[Sampled | None]:
            draft._token_ms = self.set_ms
            return step(draft, works)

        monkeypatch.setattr(SimulatedDraft, "step", slowed)


@pytest.fixture
def slowness(monkeypatch: pytest.MonkeyPatch) -> Slowness:
    return Slowness(monkeypatch)


def num_waits(caplog: pytest.LogCaptureFixture) -> int:
    """Proposals that were waited for in vain."""
    return sum("is late" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("fields", [{"num_draft_tokens": 4}, {}], ids=["fixed", "adaptive"])
async def test_a_draft_that_became_slow_is_not_waited_for_and_used_again_when_it_is_quick(
    start_cluster: StartCluster, slowness: Slowness, caplog: pytest.LogCaptureFixture, fields: dict[str, int]
) -> None:
    caplog.set_level(logging.INFO)
    async with start_cluster(target=STEADY) as cluster, asyncio.timeout(60):
        request = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, **fields}
        call = cluster.stub.Generate(pb.GenerateRequest(**request))

        async def read(num_tokens: int, num_drafted: int = 0) -> int:
            """Reads on until there are at least so many; returns how many were drafted."""
            num_read = num_found = 0
            while num_read < num_tokens or num_found < num_drafted:
                origins = (await call.read()).origins
                num_read += len(origins)
                num_found += list(origins).count(sampling_pb2.TOKEN_ORIGIN_DRAFT)
            return num_found

        await read(0, num_drafted=40)
        before, slowness.set_ms = num_waits(caplog), SLOW_MS
        await read(10)  # what was under way
        assert await read(300) <= 8
        assert 1 <= num_waits(caplog) - before <= 3
        slowness.set_ms = 1.0
        await read(0, num_drafted=40)
        call.cancel()


async def test_a_slow_draft_is_left_for_one_that_is_not(start_many: StartMany, monkeypatch: pytest.MonkeyPatch) -> None:
    step = SimulatedDraft.step
    slow: list[SimulatedDraft] = []

    def slowed(draft: SimulatedDraft, works: list[Work]) -> list[Sampled | None]:
        """The first that is asked is slow for good."""
        slow[:] = slow or [draft]
        draft._token_ms = SLOW_MS / 4 if draft is slow[0] else 1.0
        return step(draft, works)

    monkeypatch.setattr(SimulatedDraft, "step", slowed)
    async with start_many([STEADY], [DRAFT, DRAFT]) as cluster, asyncio.timeout(60):
        request = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "sampling": SAMPLED}
        plain = await cluster.generate(**request, num_draft_tokens=0)
        running = asyncio.create_task(cluster.generate(**request, num_draft_tokens=4))
        assert await wait_until(lambda: any(d.engine.load.num_sequences for d in cluster.drafts), 10, 0.002)
        [first] = [draft for draft in cluster.drafts if draft.engine.load.num_sequences]
        [other] = [draft for draft in cluster.drafts if draft is not first]
        assert await wait_until(lambda: other.engine.load.num_sequences == 1, 20, 0.002)
        result = await running
        assert result.tokens == plain.tokens
        assert result.finished.statistics.num_drafts >= 5
