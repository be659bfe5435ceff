"""Does faults to parts.

Owns: what each kind of fault is, from its beginning to its end. Must not know: why this one now, what clients see.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tests.chaos.faults import Fault, Kind
from tests.chaos.parts import Part
from tests.fakes.tcp_proxy import TcpProxy

DELAY_S = 0.06
"""Of each way."""
_RESET_EVERY_S = 0.4


async def inject(fault: Fault, part: Part, ways: Sequence[TcpProxy]) -> None:
    """Returns when the fault has ended: the part runs under its address again. `ways` are those that are cut."""
    if fault.kind in (Kind.KILL, Kind.KILL_WITH_DATA):
        await part.kill()
        if fault.kind is Kind.KILL_WITH_DATA:
            part.lose_data()
        await asyncio.sleep(fault.duration_s)
        await part.start()
    elif fault.kind is Kind.PAUSE:
        part.pause()
        try:
            await asyncio.sleep(fault.duration_s)
        finally:
            part.wake()
    else:
        await _cut(fault, ways)


async def _cut(fault: Fault, ways: Sequence[TcpProxy]) -> None:
    try:
        for way in ways:
            if fault.kind is Kind.DELAY:
                way.delay_s = DELAY_S
            elif fault.kind is Kind.DROP:
                way.silence()
        if fault.kind is Kind.RESET:
            await _reset(fault, ways)
        else:
            await asyncio.sleep(fault.duration_s)
    finally:
        for way in ways:
            way.delay_s = 0.0
            way.mend()


async def _reset(fault: Fault, ways: Sequence[TcpProxy]) -> None:
    for _ in range(max(1, round(fault.duration_s / _RESET_EVERY_S))):
        for way in ways:
            way.reset()
        await asyncio.sleep(_RESET_EVERY_S)
