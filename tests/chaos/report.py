"""What a run found, for people and for programs.

Owns: the table, the document, the verdict. Must not know: how the run was made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.chaos.faults import KINDS, Kind, Role
from tests.chaos.load import Tally
from tests.chaos.memory import Growth

MAX_GROWTH = 0.01
"""Of memory, each 100 requests."""
FULL_RUN, LEAST_EACH = 150, 10
"""A run of so many faults has to hold so many of each part and kind, and to measure the growth of these roles."""
MEASURED = (Role.COORDINATOR, Role.DRAFT, Role.TARGET)
_NUM_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Findings:
    """Of one run. `waits_s`: of every reply that was at the part that a fault hit, the longest wait for a token while
    it lasted, and until the next one. `gap_s`: the same without faults, from token to token, 99th percentile."""

    counts: Counter[tuple[Role, Kind]]
    tally: Tally
    waits_s: Mapping[tuple[Role, Kind], Sequence[float]]
    gap_s: float
    num_early: int
    num_looks: int
    num_stale_writes: int
    num_late_writes: int
    held: Mapping[str, int]
    """What was left after the last reply, by part: blocks in use, sequences, generations."""
    num_crashed: int
    num_tracebacks: int
    growth: Mapping[str, Growth]
    seconds: float

    def failures(self) -> dict[str, int]:
        """What has to be 0."""
        return {
            "num_lost": self.tally.num_lost,
            "num_doubled": self.tally.num_doubled,
            "num_wrong": self.tally.num_wrong,
            "num_unfinished": self.tally.num_unfinished,
            "num_leaked_blocks": sum(self.held.values()),
            "num_early": self.num_early,
            "num_stale_writes": self.num_stale_writes,
            "num_crashed": self.num_crashed,
            "num_tracebacks": self.num_tracebacks,
            "num_growing": sum(growth.share >= MAX_GROWTH for growth in self.growth.values()),
            "num_unmeasured": len(self.unmeasured),
            "num_scarce": len(self.scarce),
        }

    @property
    def failed(self) -> bool:
        return any(self.failures().values())

    @property
    def unmeasured(self) -> list[str]:
        """Roles whose memory's growth is unknown, though the run was a full one."""
        return [role.value for role in MEASURED if role.value not in self.growth] if self._is_full else []

    @property
    def scarce(self) -> list[str]:
        """Parts and kinds that came too seldom for a full run."""
        numbers = Counter[str]()
        for (role, kind), number in self.counts.items():
            numbers[_name(role, kind)] += number
        wanted = dict.fromkeys(_name(role, kind) for role in Role for kind in KINDS[role])
        return [name for name in wanted if numbers[name] < LEAST_EACH] if self._is_full else []

    @property
    def _is_full(self) -> bool:
        return self.counts.total() >= FULL_RUN

    def waits_ms(self, *faults: tuple[Role, Kind]) -> list[float]:
        """Of these faults' replies."""
        return [1e3 * wait_s for fault in faults for wait_s in self.waits_s.get(fault, ())]


def _name(role: Role, kind: Kind) -> str:
    """Ways to be cut off are one kind; a Redis that keeps its data and one that loses them are two."""
    return f"{role.value}: {kind.value if kind.family == 'kill' else kind.family}"


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": round(float(p50), 1), "p99": round(float(p99), 1)}


def document(findings: Findings, setup: Mapping[str, object]) -> dict[str, object]:
    """For bench/results/chaos.json."""
    tally = findings.tally
    return {
        "num_faults": findings.counts.total(),
        "num_requests": tally.num_requests,
        **findings.failures(),
        "failed": [name for name, number in findings.failures().items() if number],
        "resume_ms": percentiles(findings.waits_ms(*findings.counts)),
        "memory_growth_per_100_requests": {role: round(g.share, 5) for role, g in findings.growth.items()} or None,
        "faults": [
            {
                "part": role.value,
                "kind": kind.value,
                "num_faults": number,
                "num_streams": len(findings.waits_ms((role, kind))),
                "resume_ms": percentiles(findings.waits_ms((role, kind))),
            }
            for (role, kind), number in sorted(findings.counts.items(), key=_order)
        ],
        "num_tokens": tally.num_tokens,
        "num_resumptions": tally.num_resumptions,
        "num_called_again": tally.num_called_again,
        "num_records_gone": tally.num_records_gone,
        "num_looks": findings.num_looks,
        "num_late_writes": findings.num_late_writes,
        "errors": dict(tally.errors.most_common()),
        "undisturbed_gap_p99_ms": round(1e3 * findings.gap_s, 1),
        "seconds": round(findings.seconds, 1),
        **setup,
    }


def show(findings: Findings, console: Console) -> None:
    table = Table("part", "fault", "faults", "streams at it", "next token p50", "p99", title="Faults")
    for (role, kind), number in sorted(findings.counts.items(), key=_order):
        waits = findings.waits_ms((role, kind))
        table.add_row(role.value, kind.value, str(number), str(len(waits)), *_in_ms(waits))
    waits = findings.waits_ms(*findings.counts)
    table.add_row("all", "", str(findings.counts.total()), str(len(waits)), *_in_ms(waits), style="bold")
    console.print(table)
    tally = findings.tally
    console.print(
        f"{tally.num_requests} requests, {tally.num_tokens} tokens in {findings.seconds:.0f} s; "
        f"{tally.num_resumptions} streams resumed, {tally.num_called_again} calls made again; "
        f"{findings.num_looks} looks into Redis, {findings.num_late_writes} late writes",
        highlight=False,
    )
    for role_name, growth in findings.growth.items():
        console.print(f"memory of a {role_name}: {100 * growth.share:+.3f} % each 100 requests", highlight=False)
    for trouble in tally.troubles[:_NUM_SHOWN]:
        console.print(trouble, style="red", markup=False, highlight=False)
    for name in findings.unmeasured:
        console.print(f"memory of a {name}: not measured", style="red", highlight=False)
    for name in findings.scarce:
        console.print(f"{name}: fewer than {LEAST_EACH} in a run of {FULL_RUN}", style="red", highlight=False)
    for name, number in findings.failures().items():
        console.print(f"{name}: {number}", style="bold red" if number else "green", highlight=False)


def _in_ms(values: Sequence[float]) -> list[str]:
    return ["-" if value is None else f"{value:.0f} ms" for value in percentiles(values).values()]


def _order(item: tuple[tuple[Role, Kind], int]) -> tuple[int, int]:
    (role, kind), _ = item
    return list(Role).index(role), list(Kind).index(kind)
