"""The run: one fault after the other, each to a part that has a generation in flight.

Owns: when a fault comes, and what is looked at around it. Must not know: how a fault is done, what it hits, replies.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from tests.chaos.aim import Aim, aim
from tests.chaos.faults import Fault, Kind, Role
from tests.chaos.fleet import Fleet
from tests.chaos.injection import inject
from tests.chaos.load import Load
from tests.chaos.memory import MemorySamples, Sample
from tests.chaos.watch import Watch

_GAP_S = (0.3, 1.0)
_AFTER_REDIS_S = 1.5
"""From an outage of Redis to the next fault: a coordinator that is lost before its records are complete leaves them
short, as documented."""
_SAMPLE_S = 1.0


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
        """Does `number` faults; `on_fault` hears of each in advance. Raises NothingInFlight."""
        for fault in itertools.islice(schedule, number):
            aimed = await aim(fault, self.fleet, self.watch, self.load, self.choose)
            on_fault(f"{aimed.part.name}: {fault.kind.value}")
            await self._do(fault, aimed)
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

    async def _do(self, fault: Fault, aimed: Aim) -> None:
        """Awaits nothing before the fault begins."""
        is_outage = fault.role is Role.REDIS and fault.kind is not Kind.DELAY
        if is_outage:
            self.watch.outage(True)
        if fault.role is Role.REDIS and fault.kind is Kind.DELAY:
            self.watch.every_chunk = True
        self.load.fault_began((fault.role, fault.kind), aimed.session_ids)
        await inject(fault, aimed.part, aimed.ways)
        self.load.fault_ended()
        if fault.kind is Kind.KILL_WITH_DATA:
            self.load.data_lost()
        self.watch.every_chunk = False
        if is_outage:
            self.watch.outage(False)
            await asyncio.sleep(_AFTER_REDIS_S)
        await self.watch.write_late(aimed.holders)

    async def _restart_crashed(self) -> None:
        """What has ended by itself is a defect; the run goes on."""
        for part in self.fleet.parts:
            if not part.process.running:
                self.crashes.append(f"{part.name}.{part.process.incarnation}")
                await part.start()
