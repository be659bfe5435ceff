"""Counts that a service keeps of itself while it works: what its metrics and `outrider top` are read from.

Owns: what is counted, and histograms without a library, since this is done in every round and every step.
Must not know: Prometheus, the wire, who reads. Each object is written by one thread; others read it without a lock: a
value is then at most one event older than its neighbour.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from services.common.values import DeviceUsage, WorkerActivity

LATENCY_BOUNDS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0),
)
SHORT_BOUNDS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025),
    *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
SIZE_BOUNDS = tuple(float(1 << power) for power in range(13))

MAX_CALL_KINDS = 256
OTHER = "OTHER"
"""Stands for a reason that came after too many others: reasons also come from other services."""


class Histogram:
    """How often a value was at most each of `bounds`."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        """Of values above the bound before and at most the bound itself; the last one's are above all bounds."""
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


class CallKind(NamedTuple):
    """How a call ended. `reason` is empty where none was given."""

    method: str
    code: str
    reason: str


class CallTally:
    """Calls that a gRPC server has answered, by their end. At most MAX_CALL_KINDS kinds; then reasons become OTHER.

    `expected` kinds are there from the start, with 0: a series that begins with its first event shows no increase.
    """

    def __init__(self, expected: Iterable[CallKind] = ()) -> None:
        self.counts: Counter[CallKind] = Counter(dict.fromkeys(expected, 0))

    def ended(self, method: str, code: str, reason: str = "") -> None:
        kind = CallKind(method, code, reason)
        if kind not in self.counts and len(self.counts) >= MAX_CALL_KINDS:
            kind = kind._replace(reason=OTHER)
        self.counts[kind] += 1


class WorkerTally:
    """What a worker's engine has computed. Written by the engine thread."""

    __slots__ = ("busy_ns", "num_prefill_tokens", "num_tokens", "queue_s", "step_rows", "step_s", "step_sequences")

    def __init__(self) -> None:
        self.step_s = Histogram(SHORT_BOUNDS_S)
        self.step_sequences = Histogram(SIZE_BOUNDS)
        self.step_rows = Histogram(SIZE_BOUNDS)
        self.queue_s = Histogram(SHORT_BOUNDS_S)
        self.num_prefill_tokens = 0
        self.num_tokens = 0
        self.busy_ns = 0

    def step(self, *, num_sequences: int, num_rows: int, num_prefill_tokens: int, duration_ns: int) -> None:
        """A step: its batch, the rows whose logits were wanted, and prompt tokens beside them."""
        self.step_s.observe(duration_ns / 1e9)
        self.step_sequences.observe(num_sequences)
        self.step_rows.observe(num_rows)
        self.num_prefill_tokens += num_prefill_tokens
        self.busy_ns += duration_ns

    def answered(self, num_tokens: int, queue_ns: int) -> None:
        """An answer to an item, with the tokens that it brought and how long the item had waited for its first step."""
        self.num_tokens += num_tokens
        self.queue_s.observe(queue_ns / 1e9)


class Watched(NamedTuple):
    """What can be seen of a worker while it works; the functions may be called from any thread."""

    tally: WorkerTally
    prefix_cache: Callable[[], tuple[int, int]]
    """Tokens looked up and tokens found."""
    device: Callable[[], DeviceUsage]
    utilisation: Callable[[], float | None]
    """Share of time, from 0 to 1, in which the device computed, as its driver reports it; None where it does not. May
    take milliseconds."""

    def activity(self) -> WorkerActivity:
        """All of it at this moment."""
        tally, (num_prefix_tokens, num_prefix_hit_tokens) = self.tally, self.prefix_cache()
        device = self.device()
        return WorkerActivity(
            num_steps=tally.step_s.count,
            num_step_sequences=int(tally.step_sequences.sum),
            num_step_rows=int(tally.step_rows.sum),
            num_prefill_tokens=tally.num_prefill_tokens,
            num_tokens=tally.num_tokens,
            busy_ns=tally.busy_ns,
            num_answers=tally.queue_s.count,
            queue_ns=int(tally.queue_s.sum * 1e9),
            num_prefix_tokens=num_prefix_tokens,
            num_prefix_hit_tokens=num_prefix_hit_tokens,
            memory_used_bytes=device.memory_used_bytes,
            memory_total_bytes=device.memory_total_bytes,
        )
