"""Workers that come and go, and the routes of generations over them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Any

import pytest

from services.common.breaker import THRESHOLD
from services.common.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from services.common.values import WorkerLoad
from services.coordinator.discovery import Endpoint
from services.coordinator.route import PoolRoute
from services.coordinator.worker_pool import PooledWorker, WorkerPool
from tests.fakes.workers import FakePool, FedDiscovery, info_of, settle

LOST, LATE = Unavailable("STREAM_BROKEN", "gone"), DeadlineExceeded("DEADLINE", "late")


@pytest.fixture
async def two() -> AsyncIterator[FakePool]:
    """Workers a:1 and b:1, up."""
    fake = FakePool(("a:1", info_of("a:1")), ("b:1", info_of("b:1")))
    fake.pool.start()
    await settle()
    yield fake
    await fake.pool.aclose()
    assert all(link.closed for link in fake.links.values())


def worker(fake: FakePool, address: str) -> PooledWorker[Any, Any]:
    return next(w for w in fake.pool.workers if w.address == address)


def route_over(fake: FakePool, error: Any = None) -> PoolRoute[Any, Any]:
    """Prefers workers by their address."""

    def choose(excluded: Collection[str]) -> PooledWorker[Any, Any] | None:
        able = [w for w in fake.pool.workers if w.placeable and w.address not in excluded]
        return min(able, key=lambda w: w.address, default=None)

    return PoolRoute(fake.pool, choose, lambda: error)


async def test_workers_join_and_leave_as_they_are_named(two: FakePool) -> None:
    two.discovery.feed("b:1", "c:1")
    await settle()
    assert {w.address for w in two.pool.workers} == {"b:1", "c:1"}
    assert two.links["a:1"].closed
    assert not two.links["b:1"].closed


async def test_a_worker_that_is_no_longer_named_stays_until_nothing_is_claimed_on_it(two: FakePool) -> None:
    left = worker(two, "a:1")
    two.pool.claim(left)
    two.discovery.feed("b:1")
    await settle()
    assert left.draining
    assert not left.placeable
    assert not two.links["a:1"].closed
    two.pool.release(left)
    await settle()
    assert two.links["a:1"].closed
    assert {w.address for w in two.pool.workers} == {"b:1"}


async def test_a_worker_that_is_named_again_is_taken_back(two: FakePool) -> None:
    claimed = worker(two, "a:1")
    two.pool.claim(claimed)
    two.discovery.feed("b:1")
    await settle()
    two.discovery.feed("a:1", "b:1")
    await settle()
    assert claimed.placeable
    two.pool.release(claimed)
    assert not two.links["a:1"].closed


async def test_several_discoveries_add_up() -> None:
    fake, more = FakePool(("a:1", info_of("a:1"))), FedDiscovery("b:1")
    pool: WorkerPool[Any, Any] = WorkerPool([fake.discovery, more], fake._new_link, "targets")
    pool.start()
    await settle()
    more.feed("c:1")
    await settle()
    assert {w.address for w in pool.workers} == {"a:1", "c:1"}
    await pool.aclose()


async def test_draining_is_what_the_worker_or_the_discovery_says(two: FakePool) -> None:
    two.links["a:1"].load = WorkerLoad(draining=True)
    two.discovery.feed("a:1", Endpoint("b:1", draining=True))
    await settle()
    assert [worker(two, address).placeable for address in ("a:1", "b:1")] == [False, False]


async def test_streams_that_break_in_a_row_keep_new_work_away(two: FakePool) -> None:
    link = two.links["a:1"]
    for _ in range(THRESHOLD):
        link.set_up(False)
        link.set_up(True)
    assert link.up
    assert not worker(two, "a:1").placeable


async def test_claims_and_the_sequences_of_others_are_the_load(two: FakePool) -> None:
    two.links["a:1"].num_foreign = 3
    route = route_over(two)
    assert route.place()
    assert route.place()  # it stays where it is
    assert worker(two, "a:1").num_sequences == 4
    route.close()
    route.close()
    assert worker(two, "a:1").num_sequences == 3


async def test_a_lost_worker_is_left_for_another_and_tried_again_once_all_have_failed(two: FakePool) -> None:
    route = route_over(two)
    visited = []
    for _ in range(2):
        assert route.place()
        assert route.link is not None
        visited.append(route.link.address)
        route.lost(LOST)
    assert visited == ["a:1", "b:1"]
    assert not route.place()
    assert await route.wait(1.0)
    assert route.link is not None
    assert route.link.address == "a:1"
    route.close()


async def test_a_success_forgets_what_failed_before(two: FakePool) -> None:
    route = route_over(two)
    route.place()
    route.lost(LOST)
    route.place()
    route.succeeded()
    route.leave()
    route.place()
    assert route.link is not None
    assert route.link.address == "a:1"
    route.close()


async def test_a_late_worker_gets_nothing_new_for_now_and_a_refusing_one_does(two: FakePool) -> None:
    late, refusing = route_over(two), route_over(two)
    late.place()
    late.lost(LATE, certain=True)
    assert not worker(two, "a:1").placeable
    refusing.place()
    refusing.lost(Unavailable("DRAINING", "no more"), certain=True)
    assert worker(two, "b:1").placeable


async def test_waiting_ends_when_a_worker_comes_up_or_there_is_no_hope(two: FakePool) -> None:
    for link in two.links.values():
        link.set_up(False)
    route = route_over(two)
    assert not await route.wait(0.02)
    two.links["b:1"].set_up(True)
    assert await route.wait(1.0)
    two.links["b:1"].set_up(False)
    hopeless = route_over(two, FailedPrecondition("MODEL_CHANGED", "another"))
    assert not await hopeless.wait(60.0)
    route.close()


async def test_a_generation_moves_from_a_draining_worker_only_where_another_takes_it(two: FakePool) -> None:
    route = route_over(two)
    route.place()
    assert not route.should_move
    two.links["a:1"].load = WorkerLoad(draining=True)
    assert route.should_move
    two.links["b:1"].set_up(False)
    assert not route.should_move
    route.close()


async def test_a_worker_that_has_gone_or_drains_since_it_was_chosen_is_not_opened_on(two: FakePool) -> None:
    route = route_over(two)
    for leave in ("down", "draining"):
        assert route.place()
        if leave == "down":
            two.links["a:1"].set_up(False)
        else:
            two.links["a:1"].load = WorkerLoad(draining=True)
        assert route.place()
        assert route.link is not None
        assert route.link.address == "b:1"
        two.links["a:1"].set_up(True)
        route.leave()
    assert worker(two, "a:1").num_claims == worker(two, "b:1").num_claims == 0
