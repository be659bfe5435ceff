"""Limits of API keys over several coordinators that share a Redis: each client has its limits once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from services.common import redis_client
from services.common.api_keys import KeyOwner, Limits
from services.common.errors import ResourceExhausted
from services.common.quota_ledger import Answer, QuotaLedger, Use
from services.common.service import wait_until
from services.coordinator.quotas import Quotas
from tests.fakes import redis_process

ANN = KeyOwner("ann", Limits(tokens_per_min=60, max_sessions=2))


@contextlib.asynccontextmanager
async def fleet(
    redis_url: str, size: int = 2, timeout_s: float = 2.0, lease_s: int = 60
) -> AsyncIterator[list[Quotas]]:
    """The quotas of several coordinators, each with connections of its own."""
    clients = [redis_client.connect(redis_url, timeout_s) for _ in range(size)]
    try:
        yield [Quotas(QuotaLedger(client, lease_s)) for client in clients]
    finally:
        for client in clients:
            await redis_client.close(client)


async def admitted(quotas: Quotas, owner: KeyOwner, session_id: str = "x") -> bool:
    try:
        async with quotas.generation(owner, session_id):
            return True
    except ResourceExhausted:
        return False


async def test_requests_of_all_coordinators_are_one_rate_and_who_waits_as_told_is_served(redis_url: str) -> None:
    owner = KeyOwner("ann", Limits(requests_per_s=4.0))
    async with fleet(redis_url, 3) as all_quotas:
        waits = []
        for number in range(30):
            try:
                await all_quotas[number % 3].count_request(owner)
            except ResourceExhausted as error:
                waits.append(error.retry_after_ms or 0)
        assert len(waits) in (25, 26)  # a burst of four, and one more where this took a quarter of a second
        assert all(0 < wait <= 251 for wait in waits)
        await asyncio.sleep(waits[-1] / 1e3)
        await all_quotas[0].count_request(owner)


async def test_more_requests_at_once_than_there_are_connections_are_counted_all(redis_url: str) -> None:
    client = redis_client.connect(f"{redis_url}?max_connections={redis_client.MIN_CONNECTIONS}", 2.0)
    try:
        ledger = QuotaLedger(client)
        asked = [ledger.request("ann", 1e-3, 100.0) for _ in range(300)]
        answers = await asyncio.gather(*asked)
        assert not ledger.away
        assert sum(answer is not None and answer.admitted for answer in answers) == 100
    finally:
        await redis_client.close(client)


async def test_tokens_that_one_coordinator_counted_refuse_at_another(redis_url: str) -> None:
    async with fleet(redis_url) as (first, second):
        async with first.generation(ANN, "a") as count_tokens:
            count_tokens(90)
        with pytest.raises(ResourceExhausted, match="60 tokens a minute") as caught:
            async with second.generation(ANN, "b"):
                pass
        assert 25_000 < (caught.value.retry_after_ms or 0) <= 31_001


async def test_tokens_of_a_running_generation_reach_the_others_before_it_ends(redis_url: str) -> None:
    async with (
        fleet(redis_url) as (first, second),
        first.reporting(),
        first.generation(ANN, "a") as count_tokens,
    ):
        count_tokens(90)
        async with asyncio.timeout(5):
            while await admitted(second, ANN):  # noqa: ASYNC110  # what another tells Redis, nobody is told of
                await asyncio.sleep(0.02)


async def test_sessions_of_all_coordinators_are_one_number_and_come_free_with_their_end(redis_url: str) -> None:
    owner = KeyOwner("ann", Limits(max_sessions=2))
    async with fleet(redis_url, 3) as (first, second, third):
        for _ in range(20):
            async with first.generation(owner, "a"), second.generation(owner, "b"):
                assert not await admitted(third, owner, "c")
                assert not await admitted(first, owner, "c")
                assert await admitted(third, KeyOwner("bob", owner.limits), "c")
            assert await admitted(third, owner, "c")


async def test_a_session_that_goes_on_at_another_coordinator_is_no_further_one(redis_url: str) -> None:
    owner = KeyOwner("ann", Limits(max_sessions=1))
    async with fleet(redis_url) as (first, second), second.generation(owner, "a"):
        assert await admitted(first, owner, "a")
        await second.report()  # which says again what `first` gave back
        assert not await admitted(first, owner, "b")


async def test_sessions_of_a_dead_coordinator_lapse_and_those_of_a_living_one_do_not(redis_url: str) -> None:
    owner = KeyOwner("ann", Limits(max_sessions=2))
    async with (
        fleet(redis_url, 3, lease_s=2) as (dead, living, other),
        dead.generation(owner, "a"),
        living.generation(owner, "b"),
        living.reporting(),
    ):
        assert not await admitted(other, owner, "c")
        async with asyncio.timeout(10):
            while not await admitted(other, owner, "c"):  # noqa: ASYNC110  # time passes for the server
                await asyncio.sleep(0.05)
        async with other.generation(owner, "c"):
            assert not await admitted(other, owner, "d")


async def test_without_the_store_each_coordinator_goes_by_its_own_count_until_it_is_back(tmp_path: Path) -> None:
    owner = KeyOwner("ann", Limits(max_sessions=1))
    with redis_process.running(tmp_path) as server:
        async with fleet(server.url, timeout_s=0.2) as (first, second), first.reporting(), second.reporting():
            async with first.generation(owner, "a"):
                assert not await admitted(second, owner, "b")
                server.pause()
                async with second.generation(owner, "b"):
                    assert not await admitted(second, owner, "c")
                    assert not await admitted(first, owner, "c")
                server.wake()
                async with asyncio.timeout(10):
                    while await admitted(second, owner, "b"):  # noqa: ASYNC110  # the same
                        await asyncio.sleep(0.05)
            assert await wait_until(lambda: not second._ledger.away, 5)
            assert await admitted(second, owner, "b")


async def test_a_flood_of_refused_requests_does_not_reach_the_store(redis_url: str) -> None:
    owner = KeyOwner("ann", Limits(requests_per_s=1.0, max_sessions=1))
    async with fleet(redis_url) as (first, second), first.generation(owner, "a"):
        await second.count_request(owner)
        with pytest.raises(ResourceExhausted):
            await first.count_request(owner)
        with Redis.from_url(redis_url) as client:
            before = client.info("commandstats")
            for _ in range(50):
                with contextlib.suppress(ResourceExhausted):
                    await first.count_request(owner)
                assert not await admitted(first, owner, "b")
            after = client.info("commandstats")
        assert after["cmdstat_evalsha"]["calls"] - before["cmdstat_evalsha"]["calls"] <= 1


async def test_without_limits_the_store_is_not_asked() -> None:
    async with fleet("redis://127.0.0.1:1/0", timeout_s=0.2) as (quotas, _):
        owner = KeyOwner("ann")
        for number in range(100):
            await quotas.count_request(owner)
            async with quotas.generation(owner, str(number)) as count_tokens:
                count_tokens(10**9)
        assert not quotas._ledger.away


STEPS = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from("abcd"), st.sampled_from(["start", "end", "tokens"]), st.integers(0, 15)
    ),
    max_size=40,
)


class Sessions:
    """Generations that are held open, by session."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[contextlib.AsyncExitStack, object]] = {}

    async def step(self, quotas: Quotas, session: str, action: str, number: int) -> str:
        """What came of it."""
        if action == "start" and session not in self.held:
            stack = contextlib.AsyncExitStack()
            try:
                count = await stack.enter_async_context(quotas.generation(ANN, session))
            except ResourceExhausted as error:
                return error.reason
            self.held[session] = stack, count
        elif action == "end" and session in self.held:
            await self.held.pop(session)[0].aclose()
        elif action == "tokens" and session in self.held:
            self.held[session][1](number)  # type: ignore[operator]
        return ""

    async def aclose(self) -> None:
        for stack, _ in self.held.values():
            await stack.aclose()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_three_coordinators_that_report_decide_as_one_would(
    redis_url: str, steps: list[tuple[int, str, str, int]]
) -> None:
    """Between whole tokens, of which less than one drains meanwhile."""

    async def main() -> None:
        alone, together, one = Sessions(), Sessions(), Quotas()
        async with fleet(redis_url, 3) as all_quotas:
            for index, session, action, number in steps:
                expected = await alone.step(one, session, action, number)
                assert await together.step(all_quotas[index], session, action, number) == expected
                for quotas in all_quotas:
                    await quotas.report()
            await together.aclose()
        await alone.aclose()

    with Redis.from_url(redis_url) as client:
        client.flushall()
    asyncio.run(main())


async def test_a_session_whose_client_left_while_it_was_entered_is_given_back(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, enter, entered = KeyOwner("ann", Limits(max_sessions=1)), QuotaLedger.enter, asyncio.Event()

    async def answered_late(ledger: QuotaLedger, use: Use, session_id: str) -> None:
        await enter(ledger, use, session_id)
        entered.set()
        await asyncio.Event().wait()

    async with fleet(redis_url) as (first, second):
        with monkeypatch.context() as patched:
            patched.setattr(QuotaLedger, "enter", answered_late)
            entering = asyncio.create_task(admitted(first, owner, "a"))
            await entered.wait()
            entering.cancel()
            await asyncio.wait([entering])
        await first.report()
        assert await admitted(second, owner, "b")


async def test_a_session_that_the_fleet_admits_and_its_coordinator_refuses_is_given_back(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, enter = KeyOwner("ann", Limits(tokens_per_min=60, max_sessions=2)), QuotaLedger.enter
    async with fleet(redis_url) as (first, second), first.generation(owner, "a") as count_tokens:

        async def overtaken(ledger: QuotaLedger, use: Use, session_id: str) -> Answer | None:
            answer = await enter(ledger, use, session_id)
            count_tokens(90)
            return answer

        with monkeypatch.context() as patched:
            patched.setattr(QuotaLedger, "enter", overtaken)
            assert not await admitted(first, owner, "b")
        await first.report()
        assert await admitted(second, KeyOwner("ann", Limits(max_sessions=2)), "c")
