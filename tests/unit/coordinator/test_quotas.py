from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.api_keys import KeyOwner, Limits
from services.common.errors import ResourceExhausted
from services.coordinator.quotas import Quotas


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0.0, 0.6), max_size=60), st.sampled_from([1.0, 2.0, 5.0]))
def test_no_window_holds_more_requests_than_the_rate_and_a_burst(gaps: list[float], rate: float) -> None:
    """And a refused client that waits as it was told is not refused again."""
    clock = Clock()
    quotas, owner = Quotas(clock=clock), KeyOwner("ann", Limits(requests_per_s=rate))
    admitted: list[float] = []

    async def send() -> None:
        for gap in gaps:
            clock.now += gap
            try:
                await quotas.count_request(owner)
            except ResourceExhausted as error:
                clock.now += (error.retry_after_ms or 0) / 1e3
                await quotas.count_request(owner)
            admitted.append(clock.now)

    asyncio.run(send())
    for i, first in enumerate(admitted):
        for j in range(i, len(admitted)):
            assert j - i + 1 <= max(1.0, rate) + rate * (admitted[j] - first) + 1e-6


async def test_tokens_may_be_overdrawn_once_and_are_paid_back() -> None:
    clock = Clock()
    quotas, owner = Quotas(clock=clock), KeyOwner("ann", Limits(tokens_per_min=60))
    async with quotas.generation(owner, "a") as count:
        count(90)
    for waited, admitted in ((0.0, False), (30.0, False), (1.1, True)):
        clock.now += waited
        if admitted:
            async with quotas.generation(owner, "a"):
                pass
        else:
            with pytest.raises(ResourceExhausted) as caught:
                async with quotas.generation(owner, "a"):
                    pass
            assert caught.value.reason == "RATE_LIMITED"


async def test_sessions_are_counted_once_each_and_come_free() -> None:
    quotas, owner = Quotas(clock=Clock()), KeyOwner("ann", Limits(max_sessions=1))
    async with quotas.generation(owner, "a"):
        async with quotas.generation(owner, "a"):
            pass
        with pytest.raises(ResourceExhausted, match="1 sessions"):
            async with quotas.generation(owner, "b"):
                pass
        async with quotas.generation(KeyOwner("bob", Limits(max_sessions=1)), "b"):
            pass
    async with quotas.generation(owner, "b"):
        pass


async def test_without_limits_nothing_is_refused() -> None:
    quotas, owner = Quotas(clock=Clock()), KeyOwner("ann")
    for number in range(1000):
        await quotas.count_request(owner)
        async with quotas.generation(owner, str(number)) as count:
            count(10**9)
    assert not quotas._usages["ann"]._ended  # nobody would ever take them away
