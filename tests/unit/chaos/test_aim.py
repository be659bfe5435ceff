"""A fault strikes only where a generation is in flight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.chaos import aim as aiming
from tests.chaos.aim import Aim, NothingInFlight, aim
from tests.chaos.conductor import Conductor
from tests.chaos.faults import Fault, Kind, Role
from tests.chaos.fleet import Fleet, Standing
from tests.chaos.load import Load
from tests.chaos.parts import Part, PartProcess
from tests.chaos.watch import Holders, Watch
from tests.fakes.tcp_proxy import TcpProxy

COORDINATORS, TARGETS, REDIS = ("c1", "c2", "c3"), ("t1", "t2", "t3"), "redis"
CUT = Fault(Role.REDIS, Kind.RESET, 1.0, everywhere=False)


def part(name: str, role: Role, num_proxies: int) -> Part:
    process = PartProcess(name, (), Path(), {})
    return Part(name, role, 0, process, [TcpProxy("127.0.0.1", 0) for _ in range(num_proxies)])


class StandingFleet(Fleet):
    """Parts that say how many generations are at them; their names are their instances."""

    def __init__(self, **num_in_flight: int) -> None:
        parts = [part(name, Role.COORDINATOR, 1) for name in COORDINATORS]
        parts += [part(name, Role.TARGET, 1) for name in TARGETS]
        super().__init__([*parts, part(REDIS, Role.REDIS, 3)], 0, "simulated")
        self._num_in_flight = num_in_flight

    async def ask(self, part: Part) -> Standing:
        if part.role is Role.REDIS:
            return Standing("", sum(self._num_in_flight.values()), 0)
        return Standing(part.name, self._num_in_flight.get(part.name, 0), 0)


class Sessions:
    """`held`: who has which session, as the records say. Those of `ended` end while that is looked up."""

    def __init__(self, held: Mapping[str, tuple[str, ...]], ended: Sequence[str] = ()) -> None:
        self._held, self._ended, self.session_ids = held, ended, list(held)

    async def holders(self, session_ids: list[str]) -> dict[str, Holders]:
        self.session_ids = [session_id for session_id in self.session_ids if session_id not in self._ended]
        return {session_id: Holders(1, frozenset(self._held[session_id])) for session_id in session_ids}


async def aimed(fault: Fault, fleet: Fleet, sessions: Sessions, seed: int = 0) -> Aim:
    return await aim(fault, fleet, cast(Watch, sessions), cast(Load, sessions), Random(seed))


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiming, "_MAX_WAIT_S", 0.02)
    monkeypatch.setattr(aiming, "_POLL_S", 0.001)


@pytest.mark.parametrize("seed", range(5))
async def test_a_part_is_hit_that_says_and_is_said_to_have_a_generation(seed: int) -> None:
    """t1 has none that a client receives, t2 is only said to have one."""
    fleet, sessions = StandingFleet(t1=1, t3=1), Sessions({"a": ("c1", "t2"), "b": ("c1", "t3")})
    found = await aimed(Fault(Role.TARGET, Kind.KILL), fleet, sessions, seed)
    assert (found.part.name, found.session_ids) == ("t3", ["b"])


@pytest.mark.parametrize("seed", range(5))
async def test_redis_is_cut_off_from_a_coordinator_that_has_a_generation(seed: int) -> None:
    fleet, sessions = StandingFleet(c2=1), Sessions({"a": ("c2", "t1"), "b": ("gone", "t1")})
    found = await aimed(CUT, fleet, sessions, seed)
    assert (found.part.name, found.session_ids) == (REDIS, ["a"])
    assert found.ways == (found.part.proxies[COORDINATORS.index("c2")],)


async def test_all_of_redis_is_at_every_session() -> None:
    found = await aimed(Fault(Role.REDIS, Kind.KILL), StandingFleet(c1=1), Sessions({"a": ("c1",), "b": ("c2",)}))
    assert (found.session_ids, len(found.ways)) == (["a", "b"], 3)


@pytest.mark.parametrize("fault", [Fault(Role.TARGET, Kind.PAUSE), Fault(Role.REDIS, Kind.KILL), CUT])
async def test_a_generation_that_has_just_ended_is_not_in_flight(fault: Fault) -> None:
    sessions = Sessions({"a": ("c1", "t1")}, ended=["a"])
    with pytest.raises(NothingInFlight):
        await aimed(fault, StandingFleet(c1=1, t1=1), sessions)


async def test_a_fault_that_would_hit_nothing_is_neither_done_nor_counted() -> None:
    sessions: Any = Sessions({"a": ("c1", "t1")})
    conductor = Conductor(StandingFleet(c1=1), sessions, sessions, Random(0))
    with pytest.raises(NothingInFlight):
        await conductor.conduct(iter([Fault(Role.TARGET, Kind.KILL)]), 1, SimpleNamespace)
    assert conductor.counts.total() == 0
