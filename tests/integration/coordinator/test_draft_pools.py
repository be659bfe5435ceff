"""Several draft pools beside one target, and the adaptive draft length, with real servers."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace

import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common.errors import FailedPrecondition, InvalidArgument
from services.draft.server import running_draft
from tests.integration.coordinator.conftest import DRAFT, TARGET, StartCluster, StartMany

FIELDS = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "sampling": sampling_pb2.SamplingParams(temperature=0.0)}
GOOD, USELESS = replace(DRAFT, simulated_acceptance=0.95), replace(DRAFT, simulated_acceptance=0.0)


async def test_requests_choose_a_pool_by_name_and_each_keeps_its_own_statistics(start_cluster: StartCluster) -> None:
    slow = replace(TARGET, simulated_step_ms=5.0)
    async with running_draft(GOOD) as good, running_draft(USELESS) as useless:
        drafts = f"good=127.0.0.1:{good.port}@1,useless=127.0.0.1:{useless.port}@0"
        async with start_cluster(target=slow, draft=None, drafts=drafts) as cluster:
            named = {
                name: await cluster.generate(**FIELDS, num_draft_tokens=4, draft=name) for name in ("good", "useless")
            }
            unnamed = await cluster.generate(**FIELDS, num_draft_tokens=4)
            plain = await cluster.generate(**FIELDS, num_draft_tokens=0)
            with pytest.raises(InvalidArgument, match="there is good, useless") as caught:
                await cluster.generate(**FIELDS, draft="other")
            [model] = (await cluster.stub.ListModels(pb.ListModelsRequest())).models
    assert caught.value.field == "draft"
    assert {tuple(result.tokens) for result in (*named.values(), unnamed, plain)} == {tuple(plain.tokens)}
    used = [result.finished.statistics.draft for result in (*named.values(), unnamed, plain)]
    assert used == ["good", "useless", "good", ""]
    counts = {draft.name: draft for draft in model.drafts}
    assert [(d.weight, d.drafter, d.ready) for d in model.drafts] == [(1, "simulated", True), (0, "simulated", True)]
    statistics = {name: result.finished.statistics for name, result in named.items()}
    assert counts["useless"].num_draft_tokens == statistics["useless"].num_draft_tokens > 0
    assert counts["useless"].num_accepted_tokens == statistics["useless"].num_accepted_tokens
    total = statistics["good"].num_drafts + unnamed.finished.statistics.num_drafts
    assert counts["good"].num_drafts == total
    assert counts["good"].num_accepted_tokens > 0.8 * counts["good"].num_draft_tokens


async def test_sessions_of_each_model_land_on_its_own_draft_alone(start_many: StartMany) -> None:
    pair = [replace(TARGET, model_name=name) for name in ("acme/chat", "acme/code")]
    lookup = replace(DRAFT, drafter="suffix,ngram", model="")  # without a vocabulary: it fits every target
    async with running_draft(GOOD) as chat, running_draft(lookup) as code:
        settings = {
            "tokenizer": "acme/chat=simulated,acme/code=simulated",
            "drafts": f"chat:acme/chat=127.0.0.1:{chat.port},code:acme/code=127.0.0.1:{code.port}@3",
        }
        async with start_many(pair, [], **settings) as cluster:
            used, seen = {}, {}
            for model in ("acme/chat", "acme/code"):
                before = [draft.worker.activity().num_answers for draft in (chat, code)]
                requests = [
                    FIELDS | {"model": model, "prompt": f"session {n}", "num_draft_tokens": 4} for n in range(16)
                ]
                results = await asyncio.gather(*[cluster.generate(**request) for request in requests])
                used[model] = {result.finished.statistics.draft for result in results}
                after = [draft.worker.activity().num_answers for draft in (chat, code)]
                seen[model] = [now > then for now, then in zip(after, before, strict=True)]
            with pytest.raises(FailedPrecondition, match="pool code serves the target model acme/code, not acme/chat"):
                await cluster.generate(**FIELDS, model="acme/chat", draft="code")
            listed = (await cluster.stub.ListModels(pb.ListModelsRequest())).models
    assert used == {"acme/chat": {"chat"}, "acme/code": {"code"}}
    assert seen == {"acme/chat": [True, False], "acme/code": [False, True]}
    assert {model.name: [draft.name for draft in model.drafts] for model in listed} == {
        "acme/chat": ["chat"],
        "acme/code": ["code"],
    }


async def test_the_length_adapts_to_a_good_and_to_a_useless_draft(start_cluster: StartCluster) -> None:
    slow = replace(TARGET, simulated_step_ms=20.0)
    request = FIELDS | {"max_tokens": 200}
    async with start_cluster(target=slow, draft=replace(GOOD, simulated_token_ms=0.2)) as cluster:
        good = (await cluster.generate(**request)).finished.statistics
    async with start_cluster(target=slow, draft=replace(USELESS, simulated_token_ms=20.0)) as cluster:
        useless = (await cluster.generate(**request)).finished.statistics
    assert good.num_rounds < 80
    assert len(good.num_verified_tokens_per_pos) > 4
    assert useless.num_drafts < 40


async def test_a_fixed_default_is_kept(start_cluster: StartCluster) -> None:
    slow = replace(TARGET, simulated_step_ms=5.0)
    async with start_cluster(target=slow, draft=GOOD, num_draft_tokens="2") as cluster:
        statistics = (await cluster.generate(**FIELDS, session_id=str(uuid.uuid4()))).finished.statistics
    assert len(statistics.num_verified_tokens_per_pos) == 2
