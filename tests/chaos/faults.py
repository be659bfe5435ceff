"""Which faults there are, and in what order they come.

Owns: the order. Must not know: processes, proxies, how a fault is done.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


class Role(enum.Enum):
    """What a part does."""

    COORDINATOR = "coordinator"
    DRAFT = "draft"
    TARGET = "target"
    REDIS = "redis"


class Kind(enum.Enum):
    """What befalls a part. The last three are the kinds of being cut off."""

    KILL = "kill"
    KILL_WITH_DATA = "kill, data lost"
    """Of Redis alone."""
    PAUSE = "pause"
    DELAY = "cut (delay)"
    DROP = "cut (drop)"
    RESET = "cut (reset)"

    @property
    def family(self) -> str:
        """kill, pause or cut."""
        return self.value.partition(" ")[0].rstrip(",")


CUTS = (Kind.DELAY, Kind.DROP, Kind.RESET)
KINDS = {role: tuple(k for k in Kind if k is not Kind.KILL_WITH_DATA or role is Role.REDIS) for role in Role}
"""Which befall whom."""
DECK = 13
"""Faults in a row that hold each role and kind, whatever the way of being cut off."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `everywhere`: of a cut of Redis, whether every coordinator is cut off from it, or one of them."""

    role: Role
    kind: Kind
    duration_s: float = 0.0
    everywhere: bool = True


def faults(choose: Random, lease_s: float, keepalive_s: float) -> Iterator[Fault]:
    """Endless. Of a DECK in a row each role is killed, paused and cut off once, and Redis is killed without its data;
    the cuts take turns. Pauses outlast the lease, every third silence of a worker the keepalive too."""
    for number in range(1 << 30):
        cut = CUTS[number % len(CUTS)]
        deck = [Fault(Role.REDIS, Kind.KILL_WITH_DATA)]
        for role in Role:
            deck.append(Fault(role, Kind.KILL, choose.uniform(0.0, 0.5)))
            deck.append(Fault(role, Kind.PAUSE, lease_s + choose.uniform(0.5, 2.0)))
            long = cut is Kind.DROP and role in (Role.DRAFT, Role.TARGET) and number % 9 == 1
            duration_s = keepalive_s + 1.5 if long else choose.uniform(1.5, 3.0)
            deck.append(Fault(role, cut, duration_s, everywhere=choose.random() < 0.7))
        choose.shuffle(deck)
        yield from deck
