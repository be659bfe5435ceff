"""A session at a coordinator whose target is another model than the one it was begun with, or computes otherwise."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from outrider.v1 import coordinator_pb2 as pb

from services.common.errors import FailedPrecondition
from tests.integration.coordinator.conftest import TARGET, Cluster, Model, Result, StartCluster, node, start_target
from tests.integration.coordinator.test_many_workers import SLOW
from tests.integration.coordinator.test_takeover import Reader, new_request

CHANGES = [{"digest": "another"}, {"dtype": "bfloat16"}, {"noise_version": 99}]


async def generated_elsewhere(redis_url: str, changes: dict[str, Any], request: dict[str, Any]) -> Result:
    """At another coordinator, with a target of its own, which is such as `changes` say."""
    async with start_target(Model(TARGET, changes)) as target, node((target.port, 0), redis_url) as other:
        return await Cluster(other.running, target, None, other.stub).generate(**request)


@pytest.mark.parametrize("changes", CHANGES)
async def test_a_generation_is_not_resumed_by_a_target_that_computes_otherwise(
    start_cluster: StartCluster, redis_url: str, changes: dict[str, Any]
) -> None:
    async with start_cluster(target=SLOW) as cluster:
        request = new_request(max_tokens=2000)
        reader = Reader(cluster.stub, request)
        await reader.until(10)
        request["resume"] = pb.ResumePoint(num_received_tokens=5)
        with pytest.raises(FailedPrecondition) as caught:
            await generated_elsewhere(redis_url, changes, request)
        assert caught.value.reason == "MODEL_CHANGED"
        assert not reader.task.done()  # and its owner has kept it
        before = len(reader.tokens)
        await reader.until(before + 20)


@pytest.mark.parametrize("changes", CHANGES)
async def test_a_next_turn_needs_the_same_model_and_may_be_computed_otherwise(
    cluster: Cluster, redis_url: str, changes: dict[str, Any]
) -> None:
    request = new_request(max_tokens=5)
    first = await cluster.generate(**request)
    turn = {**request, "request_id": str(uuid.uuid4()), "prompt": "and"}
    if "digest" in changes:
        with pytest.raises(FailedPrecondition) as caught:
            await generated_elsewhere(redis_url, changes, turn)
        assert caught.value.reason == "MODEL_CHANGED"
    else:
        second = await generated_elsewhere(redis_url, changes, turn)
        assert list(second.started.prompt_token_ids) == [*b"hi", *first.tokens, *b"and"]
        assert len(second.tokens) == 5
