"""The run: one fault after the other, each to a part that has a generation in flight.

Owns: which part is hit and when, and what is looked at around it. Must not know: how a fault is done, replies.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from tests.chaos.faults import CUTS, Fault, Kind, Role
from tests.chaos.fleet import Fleet
from tests.chaos.injection import inject
from tests.chaos.load import Load
from tests.chaos.memory import MemorySamples, Sample
from tests.chaos.parts import Part
from tests.chaos.watch import Watch

_POLL_S = 0.05
_MAX_WAIT_S = 30.0
_GAP_S = (0.3, 1.0)
_AFTER_REDIS_S = 1.5
"""From an outage of Redis to the next fault: a coordinator that is lost before its records are complete leaves them
short, as documented."""
_SAMPLE_S = 1.0


class NothingInFlight(Exception):
    """No part of a role has a generation in flight: there is no load."""


@dataclass(slots=True)
class Conductor:
    """Of one run. `counts` are faults that hit a part with a generation in flight."""

    fleet: Fleet
    load: Load
    watch: Watch
    choose: Random
    counts: Counter[tuple[Role, Kind]] = field(default_factory=Counter)
    memory: MemorySamples = field(default_factory=MemorySamples)
    crashes: list[str] = field(default_factory=list)

    async def conduct(self, schedule: Iterator[Fault], number: int, on_fault: Callable[[str], None]) -> None:
        """Does `number` faults; `on_fault` hears of each in advance."""
        for fault, _ in zip(schedule, range(number), strict=False):
            part, instance_id = await self._pick(fault.role)
            on_fault(f"{part.name}: {fault.kind.value}")
            await self._do(fault, part, instance_id)
            self.counts[fault.role, fault.kind] += 1
            await self._restart_crashed()
            await asyncio.sleep(self.choose.uniform(*_GAP_S))

    async def sample_memory(self) -> None:
        """Until cancelled."""
        while True:
            for part in self.fleet.parts:
                if (memory_bytes := part.process.memory_bytes) is not None:
                    name = f"{part.name}.{part.process.incarnation}"
                    self.memory.add(part.role.value, name, Sample(self.load.tally.num_requests, memory_bytes))
            await asyncio.sleep(_SAMPLE_S)

    async def _do(self, fault: Fault, part: Part, instance_id: str) -> None:
        ways = part.proxies
        if fault.kind in CUTS and fault.role is Role.REDIS and not fault.everywhere:
            index, way = self.choose.choice([*enumerate(part.proxies)])
            ways, instance_id = [way], (await self.fleet.ask(self.fleet.of(Role.COORDINATOR)[index])).instance_id
        is_outage = fault.role is Role.REDIS and fault.kind is not Kind.DELAY
        holders = await self.watch.holders(self.load.session_ids)
        hit = [
            session_id for session_id, held in holders.items() if not instance_id or instance_id in held.instance_ids
        ]
        if is_outage:
            self.watch.outage(True)
        if fault.role is Role.REDIS and fault.kind is Kind.DELAY:
            self.watch.every_chunk = True
        self.load.fault_began((fault.role, fault.kind), hit)
        await inject(fault, part, ways)
        self.load.fault_ended()
        if fault.kind is Kind.KILL_WITH_DATA:
            self.load.data_lost()
        self.watch.every_chunk = False
        if is_outage:
            self.watch.outage(False)
            await asyncio.sleep(_AFTER_REDIS_S)
        await self.watch.write_late(holders)

    async def _pick(self, role: Role) -> tuple[Part, str]:
        """A part of that role with a generation in flight, and which instance it is; waits for one."""
        deadline = asyncio.get_running_loop().time() + _MAX_WAIT_S
        while asyncio.get_running_loop().time() < deadline:
            parts = self.fleet.of(role)
            self.choose.shuffle(parts)
            for part in parts:
                if (standing := await self.fleet.ask(part)).num_in_flight:
                    return part, standing.instance_id
            await asyncio.sleep(_POLL_S)
        raise NothingInFlight(f"no {role.value} had a generation in flight for {_MAX_WAIT_S:g} s")

    async def _restart_crashed(self) -> None:
        """What has ended by itself is a defect; the run goes on."""
        for part in self.fleet.parts:
            if not part.process.running:
                self.crashes.append(f"{part.name}.{part.process.incarnation}")
                await part.start()
