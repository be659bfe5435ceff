"""Which pool a request gets, held against the rule written out pool by pool."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from services.common.errors import FailedPrecondition
from services.common.values import ModelInfo, WorkerInfo
from services.coordinator.draft_pools import DraftPool, choose_pool
from services.coordinator.target_pools import TargetKind
from tests.fakes.workers import info_of


class Worker(NamedTuple):
    """A draft worker; without `vocab` it takes any; an unknown one has never been connected."""

    vocab: str
    state: str

    @property
    def info(self) -> WorkerInfo | None:
        return None if self.state == "unknown" else info_of("d:1", "draft", vocab=self.vocab)

    @property
    def may_draft(self) -> bool:
        return self.vocab in ("", "same")


class Pool(NamedTuple):
    model: str
    worker: Worker
    weight: float


VOCABS = ("same", "other", "third")
WORKERS = st.builds(Worker, st.sampled_from(("", *VOCABS)), st.sampled_from(("up", "down", "unknown")))
POOLS = st.lists(
    st.builds(Pool, st.sampled_from(("", "mine", "another")), WORKERS, st.sampled_from((0.5, 1.0, 4.0))), max_size=5
)
OTHERS = st.sets(st.sampled_from(VOCABS))


def draft_pool(name: str, pool: Pool) -> DraftPool:
    link = SimpleNamespace(up=pool.worker.state == "up", info=pool.worker.info)
    workers: Any = SimpleNamespace(workers=[SimpleNamespace(link=link)])
    return DraftPool(name, pool.weight, workers, model=pool.model)


def kind(vocab: str) -> TargetKind:
    return TargetKind("digest", vocab, "float32", 1)


def chosen(pools: dict[str, Pool], others: set[str], *, name: str = "", session_id: str = "s") -> str:
    """The pool's name; empty: plain decoding; else why the request is refused."""
    model = info_of("t:1", name="mine").model
    assert isinstance(model, ModelInfo)
    made = [draft_pool(name, pool) for name, pool in pools.items()]
    try:
        pool = choose_pool(made, name, session_id, model, kind("same"), {kind(vocab) for vocab in others})
    except FailedPrecondition as error:
        return error.reason
    return pool.name if pool else ""


def named(pools: Sequence[Pool]) -> dict[str, Pool]:
    return {f"pool-{n}": pool for n, pool in enumerate(pools)}


def allowed(pools: dict[str, Pool], others: set[str]) -> set[str]:
    """What a request without a name may get, by the rule."""
    mine = {name: pool for name, pool in pools.items() if pool.model in ("", "mine")}
    ready = {name for name, pool in mine.items() if pool.worker.state == "up" and pool.worker.may_draft}
    if ready:
        return ready
    if waiting := {n for n, pool in mine.items() if pool.worker.state == "unknown" or pool.worker.may_draft}:
        return waiting
    wrong = [pool for pool in mine.values() if pool.model or pool.worker.vocab not in others]
    return {"VOCAB_MISMATCH"} if wrong else {""}


@given(pools=POOLS.map(named), others=OTHERS, session_id=st.text(max_size=4))
def test_a_request_gets_a_pool_of_its_model_that_fits(
    pools: dict[str, Pool], others: set[str], session_id: str
) -> None:
    found = chosen(pools, others, session_id=session_id)
    event("a pool" if found.startswith("pool") else found or "plain decoding")
    assert found in allowed(pools, others)


@given(pools=POOLS.map(named), others=OTHERS, session_id=st.text(max_size=4))
def test_pools_of_other_models_change_nothing(pools: dict[str, Pool], others: set[str], session_id: str) -> None:
    mine = {name: pool for name, pool in pools.items() if pool.model != "another"}
    assert chosen(pools, others, session_id=session_id) == chosen(mine, others, session_id=session_id)


@given(pools=POOLS.filter(bool).map(named), others=OTHERS, data=st.data())
def test_a_named_pool_is_taken_or_refused(pools: dict[str, Pool], others: set[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(pools)))
    model, worker, _ = pools[name]
    expected = name
    if worker.state != "unknown" and not worker.may_draft:
        expected = "VOCAB_MISMATCH"
    if model == "another":
        expected = "MODEL_MISMATCH"
    assert chosen(pools, others, name=name) == expected


def test_the_weights_spread_requests_over_the_pools_of_their_model_alone() -> None:
    up = Worker("", "up")
    pools = {"a": Pool("mine", up, 1.0), "b": Pool("another", up, 8.0), "c": Pool("", up, 3.0)}
    found = [chosen(pools, set(), session_id=str(n)) for n in range(2000)]
    assert found.count("c") / 2000 == pytest.approx(0.75, abs=0.04)
    assert found.count("a") + found.count("c") == 2000


def test_the_refusal_names_both_models() -> None:
    pool = draft_pool("code", Pool("another", Worker("", "up"), 1.0))
    model = info_of("t:1", name="mine").model
    assert model is not None
    with pytest.raises(FailedPrecondition, match="pool code serves the target model another, not mine"):
        choose_pool([pool], "code", "s", model, kind("same"), set())
