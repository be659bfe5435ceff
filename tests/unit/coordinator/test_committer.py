from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Aborted, Internal, OutriderError, Unavailable
from services.common.service import wait_until
from services.common.session_record import Commit, RecordLost, Restoration, Write, unpack_token_ids
from services.coordinator.committer import Committer, Outage
from services.coordinator.journal import Journal, RecordCopy
from tests.fakes.virtual_time import VirtualTimeLoop, run

PROMPT = tuple(range(10))
NEVER_S = 60.0


class FakeStore:
    """Takes a round trip when told to. Applies writes as the store's scripts do, to `tokens` by session."""

    def __init__(self) -> None:
        self.batches: list[list[Write]] = []
        self.tokens: dict[str, list[int]] = {}
        self.fields: dict[str, dict[str, str]] = {}
        self.may_answer = asyncio.Event()
        self.outages = 0
        self.refused_session = ""

    async def write_all(self, writes: Sequence[Write]) -> list[OutriderError | RecordLost | None]:
        await self.may_answer.wait()
        if self.outages:
            self.outages -= 1
            raise Unavailable("STORE_UNAVAILABLE", "away")
        self.batches.append(list(writes))
        return [self._apply(write) for write in writes]

    def _apply(self, write: Write) -> OutriderError | RecordLost | None:
        if write.session_id == self.refused_session:
            return Aborted("OWNERSHIP_LOST", "taken")
        if isinstance(write, Restoration):
            self.tokens[write.session_id] = list(unpack_token_ids(write.packed_token_ids))
            self.fields[write.session_id] = {}
        else:
            stored = self.tokens.setdefault(write.session_id, [*PROMPT])
            if len(stored) < write.base_len:
                return RecordLost(write.session_id)
            stored[write.base_len :] = write.token_ids
        self.fields.setdefault(write.session_id, {}).update(write.fields)
        return None


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def committer(store: FakeStore) -> AsyncIterator[Committer]:
    committer = Committer(store, outage_after_s=NEVER_S)
    committer.start()
    yield committer
    await committer.aclose()


def new_journal(committer: Committer, session_id: str = "s") -> Journal:
    return Journal(committer, session_id, 1, RecordCopy.of(PROMPT, bytes(len(PROMPT)), b"", {"request_id": "r"}))


async def spin() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def append(journal: Journal, token: int, released: list[int] | None = None) -> None:
    seen = [] if released is None else released
    journal.append((token,), b"\1", b"", {}, lambda: seen.append(token))


async def test_writes_of_all_sessions_gather_while_a_round_trip_is_under_way(
    store: FakeStore, committer: Committer
) -> None:
    journals = [new_journal(committer, f"s{i}") for i in range(5)]
    append(journals[0], 1)
    await spin()
    for journal in journals:
        append(journal, 2)
    store.may_answer.set()
    for journal in journals:
        await journal.drain()
    assert [len(batch) for batch in store.batches] == [1, 5]


async def test_all_tokens_of_a_session_that_gather_become_one_commit(store: FakeStore, committer: Committer) -> None:
    journal = new_journal(committer)
    append(journal, 1)
    await spin()
    for token in (2, 3, 4):
        append(journal, token)
    store.may_answer.set()
    await journal.drain()
    commits = [write for batch in store.batches for write in batch if isinstance(write, Commit)]
    assert [(commit.base_len, commit.token_ids) for commit in commits] == [(10, (1,)), (11, (2, 3, 4))]


async def test_tokens_go_out_in_order_and_only_when_stored(store: FakeStore, committer: Committer) -> None:
    journal, released = new_journal(committer), list[int]()
    append(journal, 1, released)
    await spin()
    append(journal, 2, released)
    await spin()
    assert (released, journal.durable_len) == ([], 10)
    store.may_answer.set()
    await journal.drain()
    assert (released, journal.durable_len) == ([1, 2], 12)


async def test_failed_round_trips_are_repeated_and_release_nothing(store: FakeStore, committer: Committer) -> None:
    store.outages = 2
    store.may_answer.set()
    journal, released = new_journal(committer), list[int]()
    append(journal, 1, released)
    await spin()
    assert released == []
    await journal.drain()
    assert (released, journal.durable_len, committer.away) == ([1], 11, False)


def test_the_store_is_away_after_the_stated_time_and_not_before() -> None:
    async def main() -> None:
        store, released = FakeStore(), list[int]()
        committer = Committer(store, outage_after_s=0.5)
        committer.start()
        journal = new_journal(committer)
        append(journal, 1, released)
        await asyncio.sleep(0.49)
        assert (released, committer.away) == ([], False)
        await asyncio.sleep(0.02)
        assert (released, committer.away, journal.durable_len) == ([1], True, 10)
        append(journal, 2, released)
        assert released == [1, 2]
        await journal.drain()
        assert committer.is_behind("s")
        store.may_answer.set()
        await asyncio.sleep(1)
        assert (committer.away, committer.is_behind("s"), journal.durable_len) == (False, False, 12)
        assert store.tokens["s"] == [*PROMPT, 1, 2]
        store.may_answer.clear()
        append(journal, 3, released)
        await asyncio.sleep(0.3)
        assert released == [1, 2]
        await committer.aclose()

    run(main(), VirtualTimeLoop())


def test_where_an_outage_shall_stop_generations_they_fail_and_their_records_are_completed_all_the_same() -> None:
    async def main() -> None:
        store, released, failures = FakeStore(), list[int](), list[OutriderError]()
        committer = Committer(store, outage=Outage.STOP, outage_after_s=0.5)
        committer.start()
        journal = new_journal(committer)
        journal.on_failure = failures.append
        append(journal, 1, released)
        await asyncio.sleep(0.6)
        with pytest.raises(Unavailable):
            await journal.drain()
        assert ([error.reason for error in failures], released) == (["STORE_UNAVAILABLE"], [])
        journal.note({"running": "0"})
        store.may_answer.set()
        await journal.settle()
        await asyncio.sleep(1)
        assert (store.tokens["s"], store.fields["s"]) == ([*PROMPT, 1], {"running": "0"})
        assert released == []
        await committer.aclose()

    run(main(), VirtualTimeLoop())


async def test_a_record_that_the_store_has_lost_is_written_again_as_a_whole(
    store: FakeStore, committer: Committer
) -> None:
    store.may_answer.set()
    journal, released = new_journal(committer), list[int]()
    append(journal, 1, released)
    await journal.drain()
    store.tokens["s"] = []
    journal.append((2,), b"\1", b"", {"running": "0"}, lambda: released.append(2))
    await journal.drain()
    assert released == [1, 2]
    assert store.tokens["s"] == [*PROMPT, 1, 2]
    assert store.fields["s"] == {"request_id": "r", "running": "0"}
    assert journal.durable_len == 12


async def test_after_a_refusal_nothing_more_goes_out_and_other_sessions_go_on(
    store: FakeStore, committer: Committer
) -> None:
    store.refused_session = "lost"
    lost, kept, released = new_journal(committer, "lost"), new_journal(committer, "kept"), list[int]()
    append(lost, 1, released)
    append(kept, 3)
    store.may_answer.set()
    await kept.drain()
    await lost.settle()
    assert (released, lost.durable_len, kept.durable_len) == ([], 10, 11)
    with pytest.raises(Aborted):
        append(lost, 4)
    lost.note({"running": "0"})
    await spin()
    assert sum(write.session_id == "lost" for batch in store.batches for write in batch) == 1


async def test_stopping_settles_what_still_waits(store: FakeStore) -> None:
    committer = Committer(store, outage_after_s=NEVER_S)
    committer.start()
    journal = new_journal(committer)
    append(journal, 1)
    await spin()
    await committer.aclose()
    await journal.settle()
    assert isinstance(journal.failure, Unavailable)


async def test_what_comes_after_the_stop_fails_at_once_and_is_never_released(store: FakeStore) -> None:
    committer = Committer(store, outage_after_s=NEVER_S)
    committer.start()
    noting, adding, released = new_journal(committer, "a"), new_journal(committer, "b"), list[int]()
    await committer.aclose()
    noting.note({"running": "0"})
    append(adding, 1, released)
    for journal in (noting, adding):
        async with asyncio.timeout(1):
            await journal.settle()
        assert isinstance(journal.failure, Unavailable)
        assert "stopped" in journal.failure.message
        with pytest.raises(Unavailable):
            append(journal, 2, released)
    assert (released, store.batches) == ([], [])


async def test_nothing_goes_out_after_a_failure_whatever_comes_then(store: FakeStore, committer: Committer) -> None:
    journal, released = new_journal(committer), list[int]()
    append(journal, 1, released)
    append(journal, 2, released)
    await spin()  # the first write is under way
    failure = Unavailable("STORE_UNAVAILABLE", "away")
    journal.give_up(failure)
    store.may_answer.set()
    await journal.settle()
    journal.let_go()
    assert (released, journal.durable_len) == ([], 12)  # stored, for who resumes; never sent
    with pytest.raises(Unavailable):
        append(journal, 3, released)
    journal.give_up(Unavailable("STORE_UNAVAILABLE", "again"))
    assert journal.failure is failure
    assert released == []


async def test_a_defect_fails_the_writes_and_not_the_committer(
    store: FakeStore, committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def defective(writes: Sequence[Write]) -> list[OutriderError | RecordLost | None]:
        raise ZeroDivisionError

    store.may_answer.set()
    first, second = new_journal(committer, "first"), new_journal(committer, "second")
    with monkeypatch.context() as broken:
        broken.setattr(store, "write_all", defective)
        append(first, 1)
        await first.settle()
    assert isinstance(first.failure, Internal)
    append(second, 1)
    await second.drain()
    assert second.durable_len == 11


class MoodyStore(FakeStore):
    """Answers after a while, or not at all, or after it has lost its data; by the script given."""

    def __init__(self, script: Sequence[tuple[str, float]]) -> None:
        super().__init__()
        self.may_answer.set()
        self._script = itertools.cycle(script)

    async def write_all(self, writes: Sequence[Write]) -> list[OutriderError | RecordLost | None]:
        mood, delay_s = next(self._script)
        await asyncio.sleep(delay_s)
        if mood == "away":
            raise Unavailable("STORE_UNAVAILABLE", "away")
        if mood == "empty":
            self.tokens = {write.session_id: [] for write in writes}
        outcomes = await super().write_all(writes)
        if mood == "answer lost":
            raise Unavailable("STORE_UNAVAILABLE", "the answer was lost")
        return outcomes


MOODS = st.tuples(st.sampled_from(["well", "away", "empty", "answer lost"]), st.sampled_from([0.0, 0.01, 0.3]))


@given(st.lists(MOODS, max_size=12), st.lists(st.sampled_from([0.0, 0.004, 0.05, 0.4]), min_size=1, max_size=30))
def test_whatever_the_store_does_every_token_goes_out_once_in_order_and_is_stored_in_the_end(
    moods: list[tuple[str, float]], pauses: list[float]
) -> None:
    async def main() -> None:
        store, released = MoodyStore([*moods, ("well", 0.01), ("well", 0.01)]), list[int]()
        committer = Committer(store, outage_after_s=0.2)
        committer.start()
        journal = new_journal(committer)
        for token, pause_s in enumerate(pauses):
            append(journal, token, released)
            assert released == [*range(len(released))]
            await asyncio.sleep(pause_s)
        assert await wait_until(lambda: journal.is_complete, 60)
        assert released == [*range(len(pauses))]
        assert store.tokens["s"] == [*PROMPT, *released]
        assert journal.failure is None
        await committer.aclose()

    run(main(), VirtualTimeLoop())
