"""Sessions have homes among the coordinators, leave those that fail, and come back to those that return."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from services.client import OutriderClient, RetryPolicy
from services.client.connections import home_of
from services.common.errors import Unavailable
from services.common.rpc import GrpcServer
from services.common.service import wait_until
from tests.fakes.coordinator import SERVICE, FakeCoordinator, play, serving, tokens, whole
from tests.fakes.homes import session_at

QUICK = RetryPolicy(max_attempts=8, max_attempts_unreached=8, initial_backoff_s=0.001, max_backoff_s=0.002)


async def generate(client: OutriderClient, number: int) -> int:
    """One after the other, of sessions of both places in turn. Returns how often they had to try again."""
    results = [await client.complete("hi", session_id=session_at(i % 2)) for i in range(number)]
    assert {len(result.tokens) for result in results} == {2}
    return sum(result.num_resumptions for result in results)


def test_sessions_spread_over_the_addresses() -> None:
    counts = [0, 0, 0]
    for i in range(3000):
        counts[home_of(f"00000000-0000-4000-8000-{i:012}", 3)] += 1
    assert min(counts) > 900


async def test_all_of_a_sessions_calls_go_to_the_same_coordinator() -> None:
    fakes = [FakeCoordinator(whole(2)) for _ in range(3)]
    async with serving(fakes[0]) as first, serving(fakes[1]) as second, serving(fakes[2]) as third:
        for place in range(3):
            session_id = session_at(place, 3)
            for _ in range(2):
                async with OutriderClient(first, second, third, retry=QUICK) as client:
                    await client.complete("hi", session_id=session_id)
                    await client.complete("hi", session_id=session_id)
            assert [request.session_id for request in fakes[place].requests] == [session_id] * 4


async def test_a_name_of_several_coordinators_gives_each_of_them_a_share() -> None:
    one, two = FakeCoordinator(whole(2)), FakeCoordinator(whole(2))
    async with (
        serving(one) as first,
        serving(two) as second,
        OutriderClient(f"ipv4:{first},{second}", retry=QUICK) as client,
        asyncio.timeout(10),
    ):
        while not (one.requests and two.requests):  # whoever is connected first is alone for a moment
            await generate(client, 1)
        before = len(one.requests), len(two.requests)
        await generate(client, 8)
    assert (len(one.requests) - before[0], len(two.requests) - before[1]) == (4, 4)


async def test_a_coordinator_that_is_gone_is_left_out_and_has_its_share_again_when_it_is_back() -> None:
    staying, going = FakeCoordinator(whole(2)), FakeCoordinator(whole(2))
    async with serving(staying) as first:
        async with serving(going) as second:
            client = OutriderClient(first, second, retry=QUICK)
            await generate(client, 4)
        assert (len(staying.requests), len(going.requests)) == (2, 2)
        assert await generate(client, 8) == 1
        assert (len(staying.requests), len(going.requests)) == (10, 2)
        returned, server = FakeCoordinator(whole(2)), GrpcServer("127.0.0.1", int(second.rpartition(":")[2]))
        server.add(SERVICE, returned)
        async with server, client, asyncio.timeout(20):
            while not returned.requests:
                await generate(client, 2)
            num_before = len(returned.requests)
            await generate(client, 8)
            assert len(returned.requests) == num_before + 4


async def test_one_that_only_ends_what_it_has_gets_nothing_new() -> None:
    """However much it still sends of that."""
    draining = Unavailable("DRAINING", "this coordinator is stopping", retry_after_ms=1)
    busy = [part for i in range(500) for part in (tokens(0, 0), 0.005)]
    stopping, other = FakeCoordinator(play(*busy), play(draining, start=False)), FakeCoordinator(whole(2))
    policy = replace(QUICK, max_attempts_unreached=2)
    async with (
        serving(stopping) as first,
        serving(other) as second,
        OutriderClient(first, second, retry=policy) as client,
    ):
        reading = asyncio.create_task(client.complete("hi", session_id=session_at(0)))
        assert await wait_until(lambda: bool(stopping.requests), 5, 0.001)
        for _ in range(4):
            await client.complete("hi", session_id=session_at(0))
            await asyncio.sleep(0.02)  # it sends something meanwhile
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert (len(stopping.requests), len(other.requests)) == (2, 4)
