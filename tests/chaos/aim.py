"""Where a fault strikes: at a part that has generations in flight, as it says itself and as the sessions' records say.

Owns: that choice. Must not know: how a fault is done, what replies hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

from tests.chaos.faults import CUTS, Fault, Role
from tests.chaos.fleet import Fleet
from tests.chaos.load import Load
from tests.chaos.parts import Part
from tests.chaos.watch import Holders, Watch
from tests.fakes.tcp_proxy import TcpProxy

_POLL_S = 0.05
_MAX_WAIT_S = 30.0


class NothingInFlight(Exception):
    """No part of a role has a generation in flight: there is no load."""


class Aim(NamedTuple):
    """A part, those of its ways that a cut takes, the sessions there whose clients have begun to receive, never none;
    and who holds which session, of all."""

    part: Part
    ways: Sequence[TcpProxy]
    session_ids: Sequence[str]
    holders: Mapping[str, Holders]


async def aim(fault: Fault, fleet: Fleet, watch: Watch, load: Load, choose: Random) -> Aim:
    """Waits for a part to hit. What it returns is true until the caller awaits something.

    Raises NothingInFlight.
    """
    deadline = asyncio.get_running_loop().time() + _MAX_WAIT_S
    while asyncio.get_running_loop().time() < deadline:
        candidates = _candidates(fault, fleet)
        choose.shuffle(candidates)
        for asked, part, ways in candidates:
            standing = await fleet.ask(asked)
            holders = await watch.holders(load.session_ids)
            active = set(load.session_ids)
            everyone = asked.role is Role.REDIS
            hit = [i for i, held in holders.items() if everyone or standing.instance_id in held.instance_ids]
            if standing.num_in_flight and (session_ids := [i for i in hit if i in active]):
                return Aim(part, ways, session_ids, holders)
        await asyncio.sleep(_POLL_S)
    raise NothingInFlight(f"no {fault.role.value} had a generation in flight for {_MAX_WAIT_S:g} s")


def _candidates(fault: Fault, fleet: Fleet) -> list[tuple[Part, Part, Sequence[TcpProxy]]]:
    """Whom to ask for generations, which part is hit then, and its ways. Where Redis is cut off from one coordinator,
    that one is asked."""
    if fault.role is Role.REDIS and fault.kind in CUTS and not fault.everywhere:
        (redis,) = fleet.of(Role.REDIS)
        ways = zip(fleet.of(Role.COORDINATOR), redis.proxies, strict=True)
        return [(coordinator, redis, (way,)) for coordinator, way in ways]
    return [(part, part, part.proxies) for part in fleet.of(fault.role)]
