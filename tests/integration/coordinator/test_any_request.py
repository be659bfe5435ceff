"""Requests drawn at random: drafted, cut off and resumed anywhere, they end as plain decoding does in one piece."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common import rpc_errors
from services.common.errors import Aborted
from services.common.service import wait_until
from services.engine.simulated import SimulatedTarget
from tests.integration.coordinator.conftest import UNHURRIED_MS, Cluster, StartCluster


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> AsyncIterator[Cluster]:
    async with start_cluster(min_propose_ms=UNHURRIED_MS) as running:
        yield running


NUM_AT_ONCE = 8
MAX_CUTS = 4


@pytest.fixture(autouse=True)
def target_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says <eos> now and then, also within what is drafted."""
    init = SimulatedTarget.__init__

    def ending(self: SimulatedTarget, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, "eos_probability": 0.03})

    monkeypatch.setattr(SimulatedTarget, "__init__", ending)


async def drawn_request(cluster: Cluster, draw: random.Random) -> dict[str, Any]:
    """Everything but how it is drafted. Stops are taken from what would be said without them."""
    max_tokens = draw.choice([1, 2, 3, 5, 17, 40])
    request: dict[str, Any] = {
        "prompt": f"prompt {draw.random()}",
        "max_tokens": max_tokens,
        "sampling": sampling_pb2.SamplingParams(
            temperature=draw.choice([0.0, 1.0]),
            seed=draw.getrandbits(64),
            min_tokens=draw.choice([0, min(max_tokens, 5)]),
        ),
        "verification": draw.choice(list(sampling_pb2.VerificationMethod.values())),
        "log_probs": True,
        "num_top_log_probs": 1,
        "ignore_eos": draw.random() < 0.3,
        "include_special_tokens": draw.random() < 0.5,
    }
    free = await cluster.generate(**request, num_draft_tokens=0)
    starts = [draw.randrange(len(free.text)) for _ in range(draw.choice([0, 1, 2]) if free.text else 0)]
    request["stop"] = [free.text[start : start + draw.choice([1, 2, 4])] for start in starts]
    request["stop_token_ids"] = [draw.choice(free.tokens)] if draw.random() < 0.3 else []
    return request


async def read_in_pieces(cluster: Cluster, draw: random.Random, request: dict[str, Any]) -> list[pb.GenerateResponse]:
    """The responses of as many streams as it takes, all but the last of which are left somewhere."""
    responses: list[pb.GenerateResponse] = []
    for num_streams in range(1000):
        resume = pb.ResumePoint(num_received_tokens=sum(len(response.token_ids) for response in responses))
        call = cluster.stub.Generate(pb.GenerateRequest(**request, **({"resume": resume} if num_streams else {})))
        num_left = draw.choice([0, 1, 2, 3, 1000]) if num_streams < MAX_CUTS else 1000
        try:
            async for response in call:
                responses.append(response)
                if response.HasField("finished"):
                    return responses
                if not num_left:
                    break
                num_left -= 1
        except grpc.aio.AioRpcError as error:
            if not isinstance(
                rpc_errors.error_from_rpc(error), Aborted
            ):  # the stream before may not be known to have ended
                raise
        call.cancel()
    raise AssertionError("the generation does not end")


async def check_a_request(cluster: Cluster, draw: random.Random) -> None:
    request = await drawn_request(cluster, draw)
    whole = await cluster.generate(**request, num_draft_tokens=0)
    ids = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4())}
    responses = await read_in_pieces(cluster, draw, {**request, **ids, "num_draft_tokens": draw.choice([1, 3, 4, 16])})
    tokens = [token_id for response in responses for token_id in response.token_ids]
    assert (tokens, "".join(response.text for response in responses)) == (whole.tokens, whole.text), request
    assert responses[-1].finished.reason == whole.finished.reason
    for response in responses:
        lens = [
            len(field) for field in (response.origins, response.text_lens, response.log_probs, response.top_log_probs)
        ]
        assert lens == [len(response.token_ids)] * 4
    assert [top.token_ids[0] for response in responses for top in response.top_log_probs] == tokens
    session = await cluster.stub.GetSession(pb.GetSessionRequest(session_id=ids["session_id"]))
    assert list(session.token_ids) == [*whole.started.prompt_token_ids, *tokens]


@pytest.mark.parametrize("seed", range(4))
async def test_it_ends_as_it_would_in_one_piece_and_without_a_draft(cluster: Cluster, seed: int) -> None:
    draws = [random.Random(f"{seed} {n}") for n in range(NUM_AT_ONCE)]
    await asyncio.gather(*[check_a_request(cluster, draw) for draw in draws])
    assert cluster.draft is not None
    status = await cluster.stub.GetClusterStatus(pb.GetClusterStatusRequest())
    assert status.activity.num_accepted_tokens > 0
    engines = (cluster.target.engine, cluster.draft.engine)
    assert await wait_until(lambda: all(engine.load.num_sequences == 0 for engine in engines), 1.0)
