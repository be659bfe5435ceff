"""Which pairs of workers are served."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.common.errors import FailedPrecondition
from services.common.values import ModelInfo, WorkerInfo, WorkerLoad
from services.coordinator.placement import DraftPool, Placement


@dataclass
class Link:
    info: WorkerInfo
    up: bool = True
    load: WorkerLoad = field(default_factory=WorkerLoad)


def link(role: str, vocab: str) -> Any:
    model = ModelInfo(f"a {role}", "digest", vocab, 8, "float32", "cpu")
    return Link(WorkerInfo(role, role, model, "model" if role == "draft" else "", 16, 8, 64))


@pytest.mark.parametrize("vocab", ["same", ""])
def test_a_pair_with_one_vocabulary_is_ready(vocab):
    placement = Placement(link("target", "same"), [DraftPool("d", 1.0, link("draft", vocab))], "same")
    assert placement.served[0].ready
    assert placement.choose(4).draft is not None


def test_a_draft_of_another_vocabulary_is_refused_and_the_pair_is_not_ready():
    placement = Placement(link("target", "same"), [DraftPool("d", 1.0, link("draft", "other"))], "same")
    assert not placement.served[0].ready
    with pytest.raises(FailedPrecondition, match="a draft and the target model a target differ in vocabulary"):
        placement.choose(4)
    assert placement.choose(0).draft is None


def three_pools(**weights: float) -> tuple[Placement, list[DraftPool]]:
    pools = [DraftPool(name, weight, link("draft", "same")) for name, weight in weights.items()]
    return Placement(link("target", "same"), pools, "same"), pools


def chosen(placement: Placement, num_sessions: int) -> Counter[str]:
    placed = [placement.choose(None, session_id=str(n)) for n in range(num_sessions)]
    return Counter(p.pool.name if p.pool else "" for p in placed)


def test_unnamed_requests_are_spread_by_the_weights_and_sessions_stay():
    placement, _ = three_pools(a=1.0, b=3.0, c=0.0)
    counts = chosen(placement, 4000)
    assert counts["b"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert counts["c"] == 0
    assert chosen(placement, 4000) == counts


def test_a_named_pool_is_taken_whatever_its_weight():
    placement, pools = three_pools(a=1.0, b=0.0)
    assert placement.choose(None, "b", "s").pool is pools[1]
    assert placement.choose(0, "b", "s").pool is None


def test_sessions_move_only_from_a_pool_that_is_gone():
    placement, pools = three_pools(a=1.0, b=1.0, c=1.0)
    before = {n: placement.choose(None, session_id=str(n)).pool for n in range(300)}
    pools[1].link.up = False
    for n, pool in before.items():
        after = placement.choose(None, session_id=str(n)).pool
        assert after is (pool if pool is not pools[1] else after)
        assert after is not pools[1]


def test_a_pool_of_another_vocabulary_is_passed_over_unless_named():
    pools = [DraftPool("other", 9.0, link("draft", "other")), DraftPool("same", 1.0, link("draft", "same"))]
    placement = Placement(link("target", "same"), pools, "same")
    assert placement.served[0].ready
    assert chosen(placement, 50) == {"same": 50}
    with pytest.raises(FailedPrecondition):
        placement.choose(None, "other", "s")
