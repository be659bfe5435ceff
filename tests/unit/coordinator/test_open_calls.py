from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.api_keys import KeyOwner, Limits
from services.common.errors import ResourceExhausted
from services.coordinator.open_calls import SPARE_CALLS, OpenCalls

OWNERS = (KeyOwner("ann"), KeyOwner("bob", Limits(max_sessions=1)), KeyOwner("eve", Limits(max_sessions=1000)), None)
STEPS = st.lists(st.tuples(st.sampled_from(OWNERS), st.integers(-60, 60)), max_size=40)


@given(STEPS, st.integers(1, 8))
def test_an_owner_is_refused_exactly_while_all_its_places_are_taken(
    steps: list[tuple[KeyOwner | None, int]], max_generations: int
) -> None:
    """A positive step opens that many calls, a negative one ends that many, the oldest first."""
    calls = OpenCalls(max_generations)
    held: dict[KeyOwner | None, list[Callable[[], None]]] = {owner: [] for owner in OWNERS}
    for owner, step in steps:
        for _ in range(step):
            if len(held[owner]) < calls.most(owner):
                held[owner].append(calls.enter(owner))
                continue
            with pytest.raises(ResourceExhausted) as caught:
                calls.enter(owner)
            assert (caught.value.reason, caught.value.retry_after_ms) == ("TOO_MANY_CALLS", 1000)
        for leave in held[owner][: max(0, -step)]:
            leave()
        del held[owner][: max(0, -step)]
        assert all(calls.num_open(each) == len(held[each]) for each in OWNERS)
    for leaves in held.values():
        for leave in leaves:
            leave()
    assert not calls._counts  # names of owners that have left are not kept


@pytest.mark.parametrize(("max_sessions", "beside_spare"), [(0, 256), (1, 2), (16, 32), (128, 256), (100_000, 256)])
def test_an_owner_gets_two_calls_a_session_and_half_of_all_at_most(max_sessions: int, beside_spare: int) -> None:
    owner = KeyOwner("ann", Limits(max_sessions=max_sessions))
    assert OpenCalls(256).most(owner) == SPARE_CALLS + beside_spare
