"""Which workers are chosen, and which are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest

from services.common.errors import FailedPrecondition, Unavailable
from services.common.values import WorkerInfo, WorkerLoad
from services.coordinator.draft_pools import DraftPool
from services.coordinator.placement import Placed, Placement, Wish
from services.coordinator.tokenizer_set import TokenizerSet
from tests.fakes.workers import FakePool, info_of, settle


@dataclass
class Vocabulary:
    vocab_digest: str = "same"


@dataclass
class Cluster:
    placement: Placement
    targets: FakePool
    drafts: dict[str, FakePool]

    def place(self, **fields: Any) -> Placed:
        placed = self.try_place(**fields)
        placed.release()
        return placed

    def try_place(self, **fields: Any) -> Placed:
        return self.placement.place(Wish(**{"model": "a target", "token_ids": (1, 2), "max_len": 20, **fields}))

    def pools_of(self, num_sessions: int) -> Counter[str]:
        pools = [self.place(session_id=str(n)).pool for n in range(num_sessions)]
        return Counter(pool.name if pool else "" for pool in pools)


Start = Callable[..., Any]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`start(targets, {pool name: (weight, drafts)}, {pool name: model})`, workers being infos by address."""
    async with AsyncExitStack() as stack:

        async def started(
            targets: dict[str, WorkerInfo | None],
            drafts: dict[str, tuple[float, dict[str, WorkerInfo | None]]],
            models: Mapping[str, str] = MappingProxyType({}),
        ) -> Cluster:
            pools = {name: FakePool(*infos.items()) for name, (_, infos) in drafts.items()}
            all_targets = FakePool(*targets.items())
            placement = Placement(
                all_targets.pool,
                [
                    DraftPool(name, drafts[name][0], fake.pool, model=models.get(name, ""))
                    for name, fake in pools.items()
                ],
                TokenizerSet({"": Vocabulary()}),  # type: ignore[dict-item]
            )
            placement.start()
            stack.push_async_callback(placement.aclose)
            await settle()
            return Cluster(placement, all_targets, pools)

        yield started


def targets(*addresses: str, **model: Any) -> dict[str, WorkerInfo | None]:
    return {address: info_of(address, **model) for address in addresses}


def one_draft(vocab: str = "same", noise_version: int = 1) -> dict[str, WorkerInfo | None]:
    return {"d:1": info_of("d:1", "draft", vocab=vocab, noise_version=noise_version)}


@pytest.mark.parametrize("vocab", ["same", ""])
async def test_a_pair_with_one_vocabulary_is_ready(start: Start, vocab: str) -> None:
    cluster = await start(targets("t:1"), {"d": (1.0, one_draft(vocab))})
    assert cluster.placement.served[0].ready
    assert cluster.place().draft is not None


@pytest.mark.parametrize(("draft", "reason"), [(("other", 1), "VOCAB"), (("same", 2), "MODEL")])
async def test_a_draft_that_means_nothing_to_the_target_is_refused_and_the_pair_is_not_ready(
    start: Start, draft: tuple[str, int], reason: str
) -> None:
    cluster = await start(targets("t:1"), {"d": (1.0, one_draft(*draft))})
    assert not cluster.placement.served[0].ready
    with pytest.raises(FailedPrecondition) as caught:
        cluster.place()
    assert caught.value.reason == f"{reason}_MISMATCH"
    assert cluster.place(num_draft_tokens=0).draft is None


def three(**weights: float) -> dict[str, tuple[float, dict[str, WorkerInfo | None]]]:
    return {name: (weight, {f"{name}:1": info_of(f"{name}:1", "draft")}) for name, weight in weights.items()}


async def test_unnamed_requests_are_spread_by_the_weights_and_sessions_stay(start: Start) -> None:
    cluster = await start(targets("t:1"), three(a=1.0, b=3.0, c=0.0))
    counts = cluster.pools_of(2000)
    assert counts["b"] / 2000 == pytest.approx(0.75, abs=0.04)
    assert counts["c"] == 0
    assert cluster.pools_of(2000) == counts


async def test_a_named_pool_is_taken_whatever_its_weight(start: Start) -> None:
    cluster = await start(targets("t:1"), three(a=1.0, b=0.0))
    pool = cluster.place(draft="b", session_id="s").pool
    assert pool is not None
    assert pool.name == "b"
    assert cluster.place(num_draft_tokens=0, draft="b", session_id="s").pool is None


async def test_sessions_move_only_from_a_pool_that_is_gone(start: Start) -> None:
    cluster = await start(targets("t:1"), three(a=1.0, b=1.0, c=1.0))
    before = [cluster.place(session_id=str(n)).pool for n in range(200)]
    cluster.drafts["b"].links["b:1"].set_up(False)
    for n, pool in enumerate(before):
        after = cluster.place(session_id=str(n)).pool
        assert after.name != "b"
        assert after is pool or pool.name == "b"


async def test_a_pool_of_another_vocabulary_is_passed_over_unless_named(start: Start) -> None:
    pools = {"other": (9.0, one_draft("other")), "same": (1.0, one_draft("same"))}
    cluster = await start(targets("t:1"), pools)
    assert cluster.placement.served[0].ready
    assert cluster.pools_of(50) == {"same": 50}
    with pytest.raises(FailedPrecondition):
        cluster.place(draft="other")


async def test_drafts_of_another_served_model_leave_this_one_to_decode_plainly(start: Start) -> None:
    both = {"t:1": info_of("t:1"), "u:1": info_of("u:1", name="another", vocab="other")}
    cluster = await start(both, {"d": (1.0, one_draft("other"))})
    assert [served.ready for served in cluster.placement.served] == [True, False]  # no tokenizer for the other one
    assert cluster.place().pool is None


async def test_a_pool_of_one_model_is_no_others(start: Start) -> None:
    both = targets("t:1") | targets("u:1", name="another")
    pools = three(mine=1.0, its=1.0, typo=1.0)
    cluster = await start(both, pools, {"mine": "a target", "its": "another", "typo": "a targe"})
    assert cluster.pools_of(50) == {"mine": 50}
    assert cluster.place(model="another").pool.name == "its"
    drafts = {served.model.name: [pool.name for pool in served.drafts] for served in cluster.placement.served}
    assert drafts == {"a target": ["mine"], "another": ["its"]}
    assert cluster.placement.ready_drafts == {"mine": True, "its": True, "typo": False}
    cluster.drafts["its"].links["its:1"].set_up(False)
    assert cluster.placement.ready_drafts == {"mine": True, "its": False, "typo": False}
    assert cluster.place(model="another").pool.name == "its"  # it may come back


async def test_a_model_without_a_pool_of_its_own_decodes_plainly_and_is_ready(start: Start) -> None:
    pools = {"its": (1.0, one_draft("other"))}
    cluster = await start(targets("t:1"), pools, {"its": "another, which is not up yet"})
    assert cluster.placement.served[0].ready
    assert cluster.place().pool is None
    with pytest.raises(FailedPrecondition, match="the draft pool its serves the target model another") as caught:
        cluster.place(draft="its")
    assert caught.value.reason == "MODEL_MISMATCH"


async def test_a_pool_that_cannot_draft_for_its_own_model_is_a_mistake_whatever_else_is_served(start: Start) -> None:
    both = targets("t:1") | targets("u:1", name="another", vocab="other")
    cluster = await start(both, {"mine": (1.0, one_draft("other"))}, {"mine": "a target"})
    assert not cluster.placement.served[0].ready
    with pytest.raises(FailedPrecondition, match="differ in vocabulary"):
        cluster.place()


async def test_the_worker_with_the_cache_is_taken_unless_it_is_full_or_gone(start: Start) -> None:
    cluster = await start(targets(*(f"t{n}:1" for n in range(5))), {})
    for n in range(5):
        instance = f"instance of t{n}:1"
        assert cluster.place(target_instance_id=instance).target.instance_id == instance
    link = cluster.targets.links["t3:1"]
    link.num_foreign = 8
    assert cluster.place(target_instance_id="instance of t3:1").target.instance_id != "instance of t3:1"
    link.num_foreign = 7
    assert cluster.place(target_instance_id="instance of t3:1").target.instance_id == "instance of t3:1"
    link.set_up(False)
    assert cluster.place(target_instance_id="instance of t3:1").target.instance_id != "instance of t3:1"


async def test_what_is_placed_counts_until_it_is_released(start: Start) -> None:
    cluster = await start(targets("t:1", "u:1"), {})
    placed = [cluster.try_place() for _ in range(10)]
    counts = Counter(p.target.instance_id for p in placed)
    assert sorted(counts.values()) == [3, 7]  # equal prefixes would all go to one; the bound is ceil(1.25 * 10 / 2)
    for p in placed:
        p.release()
    assert len({cluster.place().target.instance_id for _ in range(10)}) == 1


async def test_targets_of_another_kind_are_refused_by_the_majority_and_logged_once(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    odd = info_of("odd:1", dtype="bfloat16")
    cluster = await start({"odd:1": odd, **targets("t:1", "u:1")}, {})
    chosen = {cluster.place(token_ids=(n,)).target.instance_id for n in range(50)}
    assert chosen == {"instance of t:1", "instance of u:1"}
    assert caplog.text.count("worker odd:1 is refused") == 1
    assert "dtype bfloat16 instead of float32" in caplog.text


async def test_a_route_leads_to_targets_of_its_kind_only_even_after_the_pool_has_changed(start: Start) -> None:
    cluster = await start(targets("t:1"), {})
    placed = cluster.try_place()
    cluster.targets.infos |= targets("b:1", "c:1", digest="new")
    cluster.targets.discovery.feed("t:1", "b:1", "c:1")
    await settle()
    route = placed.routes.target
    cluster.targets.links["t:1"].set_up(False)
    route.lost(Unavailable("STREAM_BROKEN", "gone"))
    assert not await route.wait(60.0)
    assert route.hopeless is not None
    assert route.hopeless.reason == "MODEL_CHANGED"  # type: ignore[attr-defined]
    assert cluster.place().model.digest == "new"


async def test_a_generation_goes_to_targets_that_take_its_length_only(start: Start) -> None:
    long = replace(info_of("long:1"), max_sequence_len=1000)
    cluster = await start({**targets("t:1", "u:1", "v:1"), "long:1": long}, {})
    assert {cluster.place(token_ids=(n,), max_len=65).target.instance_id for n in range(20)} == {"instance of long:1"}
    assert {cluster.place(token_ids=(n,), max_len=5000).target.instance_id for n in range(20)} == {"instance of long:1"}
    assert len({cluster.place(token_ids=(n,), max_len=64).target.instance_id for n in range(40)}) == 4


async def test_why_nothing_can_be_placed_is_said(start: Start) -> None:
    cluster = await start({}, {})
    with pytest.raises(Unavailable, match="no worker is known"):
        cluster.place()
    cluster = await start(targets("t:1", vocab="other"), {})
    with pytest.raises(FailedPrecondition, match="differ in vocabulary"):
        cluster.place()
    cluster = await start(targets("t:1"), {})
    cluster.targets.links["t:1"].load = WorkerLoad(draining=True)
    with pytest.raises(Unavailable) as draining:
        cluster.place()
    assert draining.value.reason == "DRAINING"
    cluster.targets.links["t:1"].set_up(False)
    with pytest.raises(Unavailable) as gone:
        cluster.place()
    assert gone.value.reason == "NO_TARGET"
    assert not cluster.placement.served[0].ready
