from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from services.common import redis_client
from services.common.errors import ResourceExhausted, Unavailable
from services.common.session_usage import Caps, SessionUsage


@pytest.fixture
async def usage(redis_url: str) -> AsyncIterator[SessionUsage]:
    redis = redis_client.connect(redis_url, 2.0)
    yield SessionUsage(redis, Caps(3, 100), idle_s=60)
    await redis_client.close(redis)


async def test_sessions_beyond_the_limit_are_refused_by_name_and_per_client(usage: SessionUsage) -> None:
    for number in range(3):
        await usage.reserve("a", f"s{number}", 10)
    with pytest.raises(ResourceExhausted, match="max_client_sessions is 3") as caught:
        await usage.reserve("a", "s3", 10)
    assert (caught.value.reason, caught.value.metadata, caught.value.retry_after_ms) == (
        "SESSION_LIMIT",
        {"limit": "3"},
        None,
    )
    await usage.reserve("a", "s2", 20)
    await usage.reserve("b", "s3", 10)
    usage.note("a", "s0", None)
    await usage.flush()
    await usage.reserve("a", "s3", 10)


async def test_tokens_beyond_the_limit_are_refused_by_name(usage: SessionUsage) -> None:
    await usage.reserve("a", "s0", 60)
    with pytest.raises(ResourceExhausted, match="max_client_tokens, which is 100") as caught:
        await usage.reserve("a", "s1", 41)
    assert caught.value.reason == "TOKEN_LIMIT"
    usage.note("a", "s0", 20)  # it ended before all that it might have become
    await usage.flush()
    await usage.reserve("a", "s1", 41)


async def test_a_session_that_expired_counts_no_more(redis_url: str) -> None:
    redis = redis_client.connect(redis_url, 2.0)
    usage = SessionUsage(redis, Caps(1, 0), idle_s=1)
    await usage.reserve("a", "s0", 10)
    with pytest.raises(ResourceExhausted):
        await usage.reserve("a", "s1", 10)
    async with asyncio.timeout(10):
        while True:
            try:
                await usage.reserve("a", "s1", 10)
                break
            except ResourceExhausted:
                await asyncio.sleep(0.1)
    await redis_client.close(redis)


async def test_an_unreachable_store_is_unavailable_and_notes_wait_for_it() -> None:
    redis = redis_client.connect("redis://127.0.0.1:1/0", 0.5)
    usage = SessionUsage(redis, Caps(1, 1), idle_s=60)
    with pytest.raises(Unavailable):
        await usage.reserve("a", "s0", 1)
    usage.note("a", "s0", 1)
    await usage.flush()
    assert usage._noted
    await redis_client.close(redis)


CHANGES = st.lists(st.tuples(st.sampled_from("abcde"), st.none() | st.integers(0, 60)), max_size=20)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES)
def test_the_sum_is_always_that_of_the_entries(redis_url: str, changes: list[tuple[str, int | None]]) -> None:
    async def main() -> dict[str, int]:
        redis = redis_client.connect(redis_url, 2.0)
        usage = SessionUsage(redis, Caps(3, 100), idle_s=60)
        held: dict[str, int] = {}
        for session, num_tokens in changes:
            if num_tokens is None:
                usage.note("a", session, None)
                await usage.flush()
                held.pop(session, None)
                continue
            grown = num_tokens - held.get(session, 0)
            refused = (session not in held and len(held) >= 3) or (grown > 0 and sum(held.values()) + grown > 100)
            try:
                await usage.reserve("a", session, num_tokens)
                assert not refused
                held[session] = num_tokens
            except ResourceExhausted:
                assert refused
        await redis_client.close(redis)
        return held

    with Redis.from_url(redis_url) as client:
        client.flushall()
        held = asyncio.run(main())
        stored = {key.decode(): int(value) for key, value in client.hgetall("outrider:usage:{a}:tokens").items()}
        assert stored == held
        assert int(client.get("outrider:usage:{a}:total") or 0) == sum(held.values())
