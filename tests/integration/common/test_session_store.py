from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from redis import Redis

from services.common import redis_client
from services.common.errors import Aborted, ConfigError, FailedPrecondition, NotFound, Unavailable
from services.common.session_record import (
    Acquisition,
    Commit,
    KvHandle,
    RecordLost,
    RecordMoved,
    Restoration,
    pack_token_ids,
)
from services.common.session_store import DEAD_AFTER_S, SessionStore
from services.common.values import FinishReason

SESSION = "6a3c2f60-0000-4000-8000-000000000001"
FIELDS = {"request_id": "r1", "prompt_len": "3", "seed": "18446744073709551615", "model": "m"}


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[SessionStore]:
    store = SessionStore.connect(redis_url, "one", idle_s=60, tombstone_s=600)
    yield store
    await store.aclose()


@pytest.fixture
async def rival(redis_url: str) -> AsyncIterator[SessionStore]:
    store = SessionStore.connect(redis_url, "two", idle_s=60, tombstone_s=600)
    yield store
    await store.aclose()


def new_session(**changes: object) -> Acquisition:
    first = Acquisition(SESSION, None, 0, (1, 2, 3), b"\0\0\0", FIELDS)
    return replace(first, **changes)  # type: ignore[arg-type]


async def test_a_new_session_holds_what_was_given(store: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    record = await store.load(SESSION)
    assert record is not None
    assert (record.token_ids, record.origins, record.lease_epoch) == ((1, 2, 3), b"\0\0\0", epoch)
    assert (record.owner_id, record.running, record.seed) == ("one", True, 2**64 - 1)
    assert (record.finish_reason, record.target_handle) == (None, None)
    assert 0 < record.expires_in_s <= 60


async def test_the_epoch_is_at_least_the_servers_time_and_what_workers_reported(store: SessionStore) -> None:
    before_ms = int(time.time() * 1000) - 1000
    assert await store.acquire(new_session()) > before_ms
    far = 2**52
    epoch = await store.acquire(
        Acquisition("other", None, 0, (1,), b"\0", FIELDS, least_epoch=far),
    )
    assert epoch == far
    assert await store.acquire(Acquisition("other", far, 1, (), b"", FIELDS)) == far + 1


async def test_commits_append_and_the_last_one_carries_finish_and_statistics(store: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    fields = {"finish_reason": "eos", "statistics": "{}", "running": "0", "target_handle": KvHandle("w", 1, 5).encode()}
    outcomes = await store.write_all(
        [Commit(SESSION, epoch, 3, (7, 8), b"\1\2", b"abcd"), Commit(SESSION, epoch, 5, (9,), b"\2", b"efgh", fields)]
    )
    assert outcomes == [None, None]
    record = await store.load(SESSION)
    assert record is not None
    assert record.token_ids == (1, 2, 3, 7, 8, 9)
    assert (record.origins, record.log_probs) == (b"\0\0\0\1\2\2", b"abcdefgh")
    assert (record.finish_reason, record.statistics, record.running) == (FinishReason.EOS, "{}", False)
    assert record.target_handle == KvHandle("w", 1, 5)


async def test_a_repeated_commit_succeeds_and_changes_nothing(store: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    commits = [Commit(SESSION, epoch, 3, (7, 8), b"\1\2"), Commit(SESSION, epoch, 5, (9,), b"\2")]
    assert await store.write_all(commits) == [None, None]
    assert await store.write_all(commits) == [None, None]
    record = await store.load(SESSION)
    assert record is not None
    assert record.token_ids == (1, 2, 3, 7, 8, 9)


async def test_a_commit_over_other_tokens_is_refused(store: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    [outcome] = await store.write_all([Commit(SESSION, epoch, 2, (7,), b"\1")])
    assert isinstance(outcome, Aborted)
    assert outcome.reason == "OWNERSHIP_LOST"


async def test_a_commit_over_some_of_its_own_tokens_adds_the_rest(store: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    assert await store.write_all([Commit(SESSION, epoch, 3, (7, 8), b"\1\2", b"aabb")]) == [None]
    assert await store.write_all([Commit(SESSION, epoch, 3, (7, 8, 9), b"\1\2\2", b"aabbcc")]) == [None]
    record = await store.load(SESSION)
    assert record is not None
    assert (record.token_ids, record.origins, record.log_probs) == (
        (1, 2, 3, 7, 8, 9),
        b"\0\0\0\1\2\2",
        b"aabbcc",
    )


def restoration(epoch: int) -> Restoration:
    fields = {**FIELDS, "running": "1"}
    return Restoration(SESSION, epoch, pack_token_ids((1, 2, 3, 7)), b"\0\0\0\1", b"", fields)


async def test_a_record_that_is_gone_or_too_short_is_lost_and_may_be_written_again(
    store: SessionStore, redis_url: str
) -> None:
    epoch = await store.acquire(new_session())
    [short] = await store.write_all([Commit(SESSION, epoch, 4, (8,), b"\1")])
    with Redis.from_url(redis_url) as client:
        client.flushall()
    [gone] = await store.write_all([Commit(SESSION, epoch, 4, (8,), b"\1")])
    assert isinstance(short, RecordLost)
    assert isinstance(gone, RecordLost)
    assert await store.write_all([restoration(epoch), Commit(SESSION, epoch, 4, (8,), b"\1")]) == [None, None]
    record = await store.load(SESSION)
    assert record is not None
    assert (record.token_ids, record.lease_epoch, record.owner_id) == ((1, 2, 3, 7, 8), epoch, "one")
    assert (record.request_id, record.running, record.seed) == ("r1", True, 2**64 - 1)
    assert 0 < record.expires_in_s <= 60


async def test_older_data_than_the_writers_is_lost_data_and_newer_is_another_owners(
    store: SessionStore, rival: SessionStore
) -> None:
    old = await rival.acquire(new_session())
    newer = old + 1000
    [behind] = await store.write_all([Commit(SESSION, newer, 3, (7,), b"\1")])
    assert isinstance(behind, RecordLost)
    assert await store.write_all([restoration(newer)]) == [None]
    for write in (restoration(old), Commit(SESSION, old, 3, (9,), b"\1")):
        [refused] = await rival.write_all([write])
        assert isinstance(refused, Aborted)
    [same_epoch] = await rival.write_all([restoration(newer)])
    assert isinstance(same_epoch, Aborted)


async def test_a_closed_session_is_not_written_again(store: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    await store.close(SESSION)
    [outcome] = await store.write_all([restoration(epoch + 1000)])
    assert isinstance(outcome, FailedPrecondition)


async def test_nothing_is_cut_off_that_the_taker_has_not_seen(store: SessionStore, rival: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    assert await store.write_all([Commit(SESSION, epoch, 3, (7,), b"\1")]) == [None]
    with pytest.raises(RecordMoved):
        await rival.acquire(Acquisition(SESSION, epoch, 3, (), b"", FIELDS, expected_len=3))
    await rival.fence(SESSION, epoch)
    [late] = await store.write_all([Commit(SESSION, epoch, 4, (8,), b"\1")])
    assert isinstance(late, Aborted)
    record = await rival.load(SESSION)
    assert record is not None
    assert (record.token_ids, record.owner_id, record.lease_epoch) == ((1, 2, 3, 7), "two", epoch + 1)


async def test_what_has_finished_is_not_fenced(store: SessionStore, rival: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    assert await store.write_all([Commit(SESSION, epoch, 3, (7,), b"\1", fields={"finish_reason": "eos"})]) == [None]
    await rival.fence(SESSION, epoch)
    record = await rival.load(SESSION)
    assert record is not None
    assert (record.owner_id, record.finish_reason) == ("one", FinishReason.EOS)


async def test_an_epoch_ahead_of_the_servers_clock_goes_on_rising(store: SessionStore, rival: SessionStore) -> None:
    ahead = int(time.time() * 1000) + 10**9
    assert await store.acquire(new_session(least_epoch=ahead)) == ahead
    taken = await rival.acquire(Acquisition(SESSION, ahead, 3, (), b"", FIELDS))
    assert taken == ahead + 1
    [old] = await store.write_all([Commit(SESSION, ahead, 3, (7,), b"\1")])
    assert isinstance(old, Aborted)


async def test_an_idle_session_expires_and_may_begin_anew(redis_url: str) -> None:
    store = SessionStore.connect(redis_url, "one", idle_s=1, tombstone_s=600)
    await store.acquire(new_session())
    async with asyncio.timeout(10):
        while await store.load(SESSION) is not None:  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.05)
    with Redis.from_url(redis_url) as client:
        assert not [key for key in client.scan_iter() if SESSION.encode() in key]
    await store.acquire(new_session())
    await store.aclose()


async def test_right_after_an_outage_nobody_counts_as_dead(redis_url: str) -> None:
    now = [100.0]
    redis = redis_client.connect(redis_url, 2.0)
    store = SessionStore(redis, "one", idle_s=60, tombstone_s=600, clock=lambda: now[0])
    assert not await store.is_alive("two")
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(redis, "set", _refuse)
        with pytest.raises(Unavailable):
            await store.heartbeat(1000)
    assert await store.is_alive("two")
    now[0] += DEAD_AFTER_S
    assert not await store.is_alive("two")
    await store.aclose()


async def _refuse(*args: object, **options: object) -> None:
    raise ConnectionError("refused")


async def test_a_taken_over_session_refuses_its_old_owner(store: SessionStore, rival: SessionStore) -> None:
    old = await store.acquire(new_session())
    new = await rival.acquire(Acquisition(SESSION, old, 3, (), b"", FIELDS))
    assert new > old
    [outcome] = await store.write_all([Commit(SESSION, old, 3, (7,), b"\1")])
    assert isinstance(outcome, Aborted)
    assert await rival.write_all([Commit(SESSION, new, 3, (8,), b"\1")]) == [None]


async def test_the_same_owner_with_an_older_epoch_is_refused(store: SessionStore) -> None:
    old = await store.acquire(new_session())
    await store.acquire(Acquisition(SESSION, old, 3, (), b"", FIELDS))
    [outcome] = await store.write_all([Commit(SESSION, old, 3, (7,), b"\1")])
    assert isinstance(outcome, Aborted)


@pytest.mark.parametrize("expected", [None, 5])
async def test_acquiring_with_an_outdated_epoch_is_busy(store: SessionStore, expected: int | None) -> None:
    await store.acquire(new_session())
    with pytest.raises(Aborted) as caught:
        await store.acquire(new_session(expected_epoch=expected))
    assert caught.value.reason == "SESSION_BUSY"


async def test_a_next_turn_cuts_the_record_and_forgets_the_last_finish(store: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    done = Commit(SESSION, epoch, 3, (7, 8), b"\1\2", b"abcdefgh", {"finish_reason": "stop", "reply": "x"})
    assert await store.write_all([done]) == [None]
    await store.acquire(Acquisition(SESSION, epoch, 4, (20, 21), b"\0\0", {"request_id": "r2", "prompt_len": "6"}))
    record = await store.load(SESSION)
    assert record is not None
    assert record.token_ids == (1, 2, 3, 7, 20, 21)
    assert (record.origins, record.log_probs) == (b"\0\0\0\1\0\0", b"")
    assert (record.finish_reason, record.reply, record.request_id) == (None, "", "r2")


async def test_a_tombstone_stops_late_writes_and_closing_is_idempotent(store: SessionStore) -> None:
    epoch = await store.acquire(new_session())
    await store.close(SESSION)
    await store.close(SESSION)
    [outcome] = await store.write_all([Commit(SESSION, epoch, 3, (7,), b"\1")])
    assert isinstance(outcome, FailedPrecondition)
    for revive in (new_session(), new_session(expected_epoch=epoch)):
        with pytest.raises(FailedPrecondition):
            await store.acquire(revive)
    with pytest.raises(FailedPrecondition) as caught:
        await store.load(SESSION)
    assert caught.value.reason == "SESSION_CLOSED"


async def test_closing_an_unknown_session_says_so(store: SessionStore) -> None:
    with pytest.raises(NotFound) as caught:
        await store.close(SESSION)
    assert caught.value.reason == "UNKNOWN_SESSION"


async def test_commits_survive_a_server_that_forgot_the_scripts(store: SessionStore, redis_url: str) -> None:
    epoch = await store.acquire(new_session())
    with Redis.from_url(redis_url) as client:
        client.script_flush()
    assert await store.write_all([Commit(SESSION, epoch, 3, (7,), b"\1"), Commit(SESSION, epoch, 4, (8,), b"\1")]) == [
        None,
        None,
    ]


async def test_every_write_renews_the_expiry_of_every_key(store: SessionStore, redis_url: str) -> None:
    epoch = await store.acquire(new_session())
    with Redis.from_url(redis_url) as client:
        keys = [key for key in client.scan_iter() if SESSION.encode() in key]
        for key in keys:
            client.expire(key, 5)
        await store.write_all([Commit(SESSION, epoch, 3, (7,), b"\1", b"abcd")])
        ttls = [client.ttl(key) for key in client.scan_iter() if SESSION.encode() in key]
    assert len(ttls) == 4
    assert all(50 < ttl <= 60 for ttl in ttls)


async def test_heartbeats_tell_living_owners_from_dead_ones(store: SessionStore) -> None:
    await store.heartbeat(60_000)
    assert await store.is_alive("one")
    assert not await store.is_alive("two")


async def test_a_server_that_evicts_is_refused(store: SessionStore, redis_url: str) -> None:
    await store.check_server()
    with Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ConfigError, match="allkeys-lru"):
        await store.check_server()


@pytest.mark.parametrize(
    "operation",
    [
        lambda store: store.load(SESSION),
        lambda store: store.acquire(new_session()),
        lambda store: store.write_all([Commit(SESSION, 1, 3, (7,), b"\1")]),
        lambda store: store.close(SESSION),
        lambda store: store.heartbeat(1000),
    ],
)
async def test_an_unreachable_server_is_unavailable(operation: Callable[[SessionStore], Awaitable[object]]) -> None:
    store = SessionStore.connect("redis://127.0.0.1:1/0", "one", idle_s=60, tombstone_s=600, timeout_s=0.5)
    with pytest.raises(Unavailable) as caught:
        await operation(store)
    assert caught.value.reason == "STORE_UNAVAILABLE"
    await store.aclose()


@pytest.mark.parametrize("url", ["garbage", "http://localhost", "redis://localhost:port"])
async def test_a_url_of_no_known_form_names_the_setting(url: str) -> None:
    with pytest.raises(ConfigError, match="redis_url"):
        SessionStore.connect(url, "one", idle_s=60, tombstone_s=600)
