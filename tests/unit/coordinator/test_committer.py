from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from services.common.errors import Aborted, Internal, OutriderError, Unavailable
from services.common.session_store import Commit
from services.coordinator.committer import MAX_COMMITS_IN_FLIGHT, Committer, Journal


class FakeStore:
    """Takes a round trip when told to. `outcomes` gives each commit's, in order of sessions asked."""

    def __init__(self) -> None:
        self.batches: list[list[Commit]] = []
        self.may_answer = asyncio.Event()
        self.outages = 0
        self.refused_session = ""

    async def commit_all(self, commits: Sequence[Commit]) -> list[OutriderError | None]:
        await self.may_answer.wait()
        if self.outages:
            self.outages -= 1
            raise Unavailable("STORE_UNAVAILABLE", "away")
        self.batches.append(list(commits))
        lost = Aborted("OWNERSHIP_LOST", "taken")
        return [lost if commit.session_id == self.refused_session else None for commit in commits]


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def committer(store: FakeStore) -> AsyncIterator[Committer]:
    committer = Committer(store, retry_s=1.0)
    committer.start()
    yield committer
    await committer.aclose()


async def spin() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def append(journal: Journal, token: int, durable: list[int] | None = None) -> None:
    seen = [] if durable is None else durable
    await journal.append((token,), b"\1", b"", {}, lambda: seen.append(token))


async def test_commits_of_all_sessions_gather_while_a_round_trip_is_under_way(
    store: FakeStore, committer: Committer
) -> None:
    journals = [Journal(committer, f"s{i}", 1, 10) for i in range(5)]
    await append(journals[0], 1)
    await spin()
    for journal in journals:
        await append(journal, 2)
    store.may_answer.set()
    for journal in journals:
        await journal.drain()
    assert [len(batch) for batch in store.batches] == [1, 5]


async def test_a_session_has_at_most_two_commits_in_flight(store: FakeStore, committer: Committer) -> None:
    journal = Journal(committer, "s", 1, 10)
    for token in range(MAX_COMMITS_IN_FLIGHT):
        await append(journal, token)
    third = asyncio.create_task(append(journal, 9))
    await spin()
    assert not third.done()
    store.may_answer.set()
    await third
    await journal.drain()
    assert [c.base_len for batch in store.batches for c in batch] == [10, 11, 12]


async def test_tokens_become_durable_in_order_and_only_when_stored(store: FakeStore, committer: Committer) -> None:
    journal, durable = Journal(committer, "s", 1, 10), list[int]()
    await append(journal, 1, durable)
    await append(journal, 2, durable)
    await spin()
    assert (durable, journal.durable_len) == ([], 10)
    store.may_answer.set()
    await journal.drain()
    assert (durable, journal.durable_len) == ([1, 2], 12)


async def test_a_store_that_comes_back_in_time_is_retried(store: FakeStore, committer: Committer) -> None:
    store.outages = 2
    store.may_answer.set()
    journal = Journal(committer, "s", 1, 10)
    await append(journal, 1)
    await journal.drain()
    assert journal.durable_len == 11


async def test_a_store_that_stays_away_fails_the_journal(store: FakeStore) -> None:
    store.outages = 10**9
    store.may_answer.set()
    committer = Committer(store, retry_s=0.05)
    committer.start()
    journal = Journal(committer, "s", 1, 10)
    failures: list[OutriderError] = []
    journal.on_failure = failures.append
    await append(journal, 1)
    with pytest.raises(Unavailable):
        await journal.drain()
    assert [error.reason for error in failures] == ["STORE_UNAVAILABLE"]
    await committer.aclose()


async def test_after_a_refusal_nothing_more_is_durable_and_other_sessions_go_on(
    store: FakeStore, committer: Committer
) -> None:
    store.refused_session = "lost"
    lost, kept, durable = Journal(committer, "lost", 1, 10), Journal(committer, "kept", 1, 10), list[int]()
    await append(lost, 1, durable)
    await append(lost, 2, durable)
    await append(kept, 3)
    store.may_answer.set()
    await kept.drain()
    await lost.settle()
    assert (durable, lost.durable_len, kept.durable_len) == ([], 10, 11)
    with pytest.raises(Aborted):
        await append(lost, 4)
    lost.note({"running": "0"})
    await spin()
    assert sum(commit.session_id == "lost" for batch in store.batches for commit in batch) == 2


async def test_stopping_settles_what_still_waits(store: FakeStore) -> None:
    committer = Committer(store, retry_s=1.0)
    committer.start()
    journal = Journal(committer, "s", 1, 10)
    await append(journal, 1)
    await spin()
    await committer.aclose()
    await journal.settle()
    assert isinstance(journal.failure, Unavailable)


async def test_a_defect_fails_the_commits_and_not_the_committer(
    store: FakeStore, committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def defective(commits: Sequence[Commit]) -> list[OutriderError | None]:
        raise ZeroDivisionError

    store.may_answer.set()
    first, second = Journal(committer, "first", 1, 10), Journal(committer, "second", 1, 10)
    with monkeypatch.context() as broken:
        broken.setattr(store, "commit_all", defective)
        await append(first, 1)
        await first.settle()
    assert isinstance(first.failure, Internal)
    await append(second, 1)
    await second.drain()
    assert second.durable_len == 11
