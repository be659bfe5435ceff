"""The chaos test's own judgement: what it counts as lost, doubled and wrong, which faults come, how memory grows."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.values import VerificationMethod
from tests.chaos.faults import Kind, Role, faults
from tests.chaos.memory import LEAST, WARM_UP, MemorySamples, Sample, growth_of
from tests.chaos.replies import Differences, differences, requests

REPLY = tuple(range(100, 140))
MIB = 1 << 20


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (REPLY, Differences()),
        (REPLY[:-3], Differences(num_lost=3)),
        (REPLY[:10] + REPLY[12:], Differences(num_lost=2)),
        (REPLY[:10] + REPLY[8:], Differences(num_doubled=2)),
        ((*REPLY, REPLY[-1]), Differences(num_doubled=1)),
        ((*REPLY[:5], 7, *REPLY[6:]), Differences(num_wrong=1)),
        ((*REPLY, 7), Differences(num_wrong=1)),
        ((), Differences(num_lost=len(REPLY))),
    ],
)
def test_a_reply_is_held_against_the_one_that_it_should_be(received: tuple[int, ...], expected: Differences) -> None:
    assert differences(REPLY, received) == expected


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20))
def test_replies_differ_if_and_only_if_something_is_counted(one: list[int], other: list[int]) -> None:
    assert any(differences(one, other)) == (one != other)


@pytest.mark.parametrize("seed", range(5))
def test_150_faults_hold_ten_of_each_role_and_kind(seed: int) -> None:
    counts = Counter((fault.role, fault.kind.family) for fault in islice(faults(Random(seed), 1.5, 8.0), 150))
    assert set(counts) == {(role, kind) for role in Role for kind in ("kill", "pause", "cut")}
    assert min(counts.values()) >= 10


def test_the_first_faults_hold_what_the_mutants_need() -> None:
    kinds = {(fault.role, fault.kind) for fault in islice(faults(Random(0), 1.5, 8.0), 13)}
    assert {(Role.REDIS, Kind.DELAY), (Role.REDIS, Kind.KILL_WITH_DATA), (Role.COORDINATOR, Kind.PAUSE)} <= kinds


def test_pauses_outlast_the_lease() -> None:
    pauses = [fault for fault in islice(faults(Random(1), 1.5, 8.0), 100) if fault.kind is Kind.PAUSE]
    assert min(fault.duration_s for fault in pauses) > 1.5


def test_a_quarter_of_the_requests_use_rejection() -> None:
    asked = requests(48, Random(0), token_ids=range(32, 127), max_tokens=range(40, 160))
    assert sum(request.options.verification is VerificationMethod.REJECTION for request in asked) == 12


def test_memory_that_grows_by_a_hundredth_each_100_requests_is_seen() -> None:
    begun = 1000
    samples = [Sample(begun + n, (150 if n < WARM_UP else 100) * MIB + n * MIB // 100) for n in range(0, 600, 7)]
    growth = growth_of(samples)
    assert growth is not None
    assert growth.share == pytest.approx(0.01, rel=0.1)


def test_what_did_not_live_for_long_enough_tells_nothing() -> None:
    assert growth_of([Sample(n, MIB + n) for n in range(0, WARM_UP + LEAST - 10, 5)]) is None


def test_a_roles_growth_is_the_mean_over_its_incarnations() -> None:
    samples = MemorySamples()
    for name, step in (("target-1.1", 0), ("target-2.1", MIB // 100)):
        for n in range(0, 2000, 10):
            samples.add("target", name, Sample(n, 100 * MIB + n * step))
    assert samples.growth()["target"].share == pytest.approx(0.005, rel=0.15)
