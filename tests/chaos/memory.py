"""How the parts' memory grows with the requests that they serve.

Owns: samples, and the slope through them. Must not know: processes.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

WARM_UP = 200
"""Requests, of all clients together, after an incarnation's start."""
LEAST = 200
"""Requests that an incarnation's samples must span after that."""


class Sample(NamedTuple):
    num_requests: int
    """That had ended by then."""
    memory_bytes: int


class Growth(NamedTuple):
    """Of one role: the share that is added each 100 requests, and the requests that this was seen over."""

    share: float
    num_requests: int


class MemorySamples:
    """By role and incarnation."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)

    def add(self, role: str, incarnation: str, sample: Sample) -> None:
        self._samples[role, incarnation].append(sample)

    def growth(self) -> dict[str, Growth]:
        """Mean of the incarnations' growths, by the requests that they are seen over; roles without are left out."""
        found: dict[str, list[Growth]] = defaultdict(list)
        for (role, _), samples in self._samples.items():
            if (growth := growth_of(samples)) is not None:
                found[role].append(growth)
        return {role: _mean(growths) for role, growths in found.items()}


def growth_of(samples: Sequence[Sample]) -> Growth | None:
    """None where an incarnation did not live for long enough."""
    warm = [sample for sample in samples if sample.num_requests >= samples[0].num_requests + WARM_UP]
    if len(warm) < 3 or (span := warm[-1].num_requests - warm[0].num_requests) < LEAST:
        return None
    numbers, sizes = [sample.num_requests for sample in warm], [sample.memory_bytes for sample in warm]
    slope = statistics.linear_regression(numbers, sizes).slope
    return Growth(100 * slope / statistics.fmean(sizes), span)


def _mean(growths: list[Growth]) -> Growth:
    total = sum(growth.num_requests for growth in growths)
    return Growth(sum(growth.share * growth.num_requests for growth in growths) / total, total)
