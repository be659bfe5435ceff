"""What fails a chaos run besides lost, doubled and wrong tokens: texts, memory, faults that came too seldom."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any

import pytest
from outrider.v1 import coordinator_pb2
from rich.console import Console

from tests.chaos.faults import Kind, Role, faults
from tests.chaos.fleet import standing_of
from tests.chaos.load import Tally
from tests.chaos.memory import Growth
from tests.chaos.mutants import TELLS, verdict
from tests.chaos.report import Findings, document, show
from tests.mutants.mutants import MUTANTS

FULL = Counter((fault.role, fault.kind) for fault in islice(faults(Random(0), 1.5, 8.0), 150))
STEADY = {role: Growth(0.001, 2000) for role in ("coordinator", "draft", "target")}
GOOD = Findings(
    counts=FULL,
    tally=Tally(num_requests=2000),
    waits_s={},
    gap_s=0.1,
    num_early=0,
    num_looks=1000,
    num_stale_writes=0,
    num_late_writes=10,
    held={},
    num_crashed=0,
    num_tracebacks=0,
    growth=STEADY,
    seconds=600.0,
)


def failed(findings: Findings) -> list[str]:
    """As programs are told, once people can be told as well."""
    show(findings, Console(quiet=True))
    told = json.loads(json.dumps(document(findings, {})))
    assert bool(told["failed"]) == findings.failed
    return list(told["failed"])


def test_a_full_run_without_a_fault_of_ours_passes() -> None:
    assert failed(GOOD) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"tally": Tally(num_lost=1)}, "num_lost"),
        ({"tally": Tally(num_doubled=1)}, "num_doubled"),
        ({"tally": Tally(num_wrong=1)}, "num_wrong"),
        ({"tally": Tally(num_unfinished=1)}, "num_unfinished"),
        ({"held": {"coordinator-1": 1}}, "num_leaked_blocks"),
        ({"num_early": 1}, "num_early"),
        ({"num_stale_writes": 1}, "num_stale_writes"),
        ({"num_crashed": 1}, "num_crashed"),
        ({"num_tracebacks": 1}, "num_tracebacks"),
        ({"growth": {**STEADY, "draft": Growth(0.01, 2000)}}, "num_growing"),
    ],
)
def test_whatever_is_not_zero_fails(changes: Mapping[str, Any], name: str) -> None:
    assert failed(replace(GOOD, **changes)) == [name]


@pytest.mark.parametrize("role", STEADY)
def test_a_full_run_fails_where_a_roles_memory_was_not_measured(role: str) -> None:
    growth = {name: growth for name, growth in STEADY.items() if name != role}
    found = replace(GOOD, growth=growth)
    assert (found.unmeasured, failed(found)) == ([role], ["num_unmeasured"])


@pytest.mark.parametrize(
    ("role", "kinds", "name"),
    [
        (Role.DRAFT, (Kind.KILL,), "draft: kill"),
        (Role.TARGET, (Kind.PAUSE,), "target: pause"),
        (Role.COORDINATOR, (Kind.DELAY, Kind.DROP, Kind.RESET), "coordinator: cut"),
        (Role.REDIS, (Kind.KILL,), "redis: kill"),
        (Role.REDIS, (Kind.KILL_WITH_DATA,), "redis: kill, data lost"),
    ],
)
def test_a_full_run_fails_with_fewer_than_ten_of_a_part_and_kind(
    role: Role, kinds: tuple[Kind, ...], name: str
) -> None:
    """Others may have come all the more often."""
    counts = Counter(FULL)
    for kind in kinds:
        counts[role, kind] = 0
    counts[role, kinds[0]] = 10
    counts[Role.TARGET, Kind.KILL] += 50
    assert failed(replace(GOOD, counts=counts)) == []
    counts[role, kinds[0]] = 9
    found = replace(GOOD, counts=counts)
    assert (found.scarce, failed(found)) == ([name], ["num_scarce"])


def test_a_short_run_is_held_to_neither() -> None:
    few = Counter((fault.role, fault.kind) for fault in islice(faults(Random(0), 1.5, 8.0), 20))
    assert failed(replace(GOOD, counts=few, growth={})) == []


def test_a_mutant_is_noticed_by_what_it_does_and_by_nothing_else() -> None:
    assert set(TELLS) <= {mutant.name for mutant in MUTANTS}
    for name, tell in TELLS.items():
        assert verdict(name, 1, {"failed": ["num_wrong", tell], "num_wrong": 1, tell: 2})["noticed"]
        assert not verdict(name, 1, {"failed": ["num_unfinished"], "num_unfinished": 1, tell: 0})["noticed"]
        assert not verdict(name, 0, {"failed": [], tell: 0})["noticed"]
        assert not verdict(name, 1, {})["noticed"]


def test_a_coordinator_still_holds_what_is_being_opened_or_waits() -> None:
    held = [
        standing_of(coordinator_pb2.GetClusterStatusResponse(instance_id="i", **counts)).num_held
        for counts in ({}, {"num_requests_running": 1}, {"num_requests_waiting": 2})
    ]
    assert held == [0, 1, 2]
