"""Which lengths are chosen, against all that could be; and who probes when nobody drafts."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.common.items import Identity, Proposed, Timings, Tokens
from services.common.values import Proposal
from services.coordinator.draft_length import (
    MAX_BACKOFF,
    PROBE_LEN,
    STOPS,
    AdaptiveLength,
    FixedLength,
    LengthPolicy,
    best_choice,
)
from services.coordinator.round_cost import RoundCost

MS = 1_000_000
MAX_DEPTH = 3
NEARLY = 0.98
"""Between two numbers of groups the best price lies between theirs."""


def cost_of(step_ms: float, row_ms: float, token_ms: float) -> RoundCost:
    cost = RoundCost()
    for rows in (1, 8, 64):
        cost.observe_step(rows, round((step_ms + row_ms * rows) * MS))
    cost.observe_draft(1, round(token_ms * MS))
    return cost


def brute_force(survivals: list[list[float]], cost: RoundCost) -> float:
    """The highest rate of all combinations of lengths."""
    n = len(survivals)
    rates = [n / cost.plain_ns(n)]
    for lengths in product(range(MAX_DEPTH + 1), repeat=n):
        tokens = n + sum(sum(s[:k]) for s, k in zip(survivals, lengths, strict=True))
        if any(lengths):
            rates.append(tokens / cost.round_ns(n, n + sum(lengths), max(lengths)))
    return max(rates)


@settings(deadline=None, max_examples=60)
@given(
    alphas=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4),
    row_ms=st.floats(0.0, 10.0),
    token_ms=st.floats(0.01, 30.0),
)
@example(alphas=[0.5, 0.875, 0.9375, 0.375], row_ms=1.0, token_ms=13.0)
@example(alphas=[0.99, 0.7, 0.3, 0.7], row_ms=3.0, token_ms=13.0)
def test_no_combination_of_lengths_is_faster(alphas: list[float], row_ms: float, token_ms: float) -> None:
    survivals = [[alpha ** (k + 1) for k in range(16)] for alpha in alphas]
    cost = cost_of(20.0, row_ms, token_ms)
    n = len(alphas)
    choice = best_choice(survivals, cost, n, max_depth=MAX_DEPTH)
    lengths = [sum(s > choice.price for s in sequence[: choice.depth]) for sequence in survivals]
    tokens = n + sum(sum(s[:k]) for s, k in zip(survivals, lengths, strict=True))
    rate = tokens / cost.round_ns(n, n + sum(lengths), choice.depth) if choice.depth else n / cost.plain_ns(n)
    assert rate >= NEARLY * brute_force(survivals, cost)


def test_expensive_rows_go_to_the_sequences_that_deserve_them() -> None:
    survivals = [[0.95 ** (k + 1) for k in range(16)], [0.2 ** (k + 1) for k in range(16)]]
    choice = best_choice(survivals, cost_of(20.0, 6.0, 0.1), 2)
    assert survivals[0][0] > choice.price > survivals[1][1]


def test_other_coordinators_sequences_count_as_ours() -> None:
    survivals = [[0.5 ** (k + 1) for k in range(16)]]
    cost = cost_of(20.0, 2.0, 0.1)
    assert best_choice(survivals, cost, 64).depth < best_choice(survivals, cost, 1).depth
    assert best_choice(survivals * 64, cost, 64).depth == best_choice(survivals, cost, 64).depth


def test_a_fixed_length_is_kept_but_for_the_end() -> None:
    assert [FixedLength(4).choose(limit) for limit in (9, 2, 0, -1)] == [4, 2, 0, 0]


class Run:
    """One sequence, told of rounds and tokens as a generation would."""

    def __init__(self, policy: LengthPolicy, *, acceptance: float, token_ms: float) -> None:
        self.length = AdaptiveLength(policy, 16)
        self.acceptance = acceptance
        self.token_ms = token_ms
        self.drafted: list[int] = []
        self.num_rounds = 0
        self.credit = 0.0

    def advance(self) -> int:
        """A round or a token; returns how many tokens were drafted."""
        num_asked = self.length.choose(100)
        self.drafted.append(num_asked)
        self.num_rounds += bool(num_asked or not self.drafted[:-1] or self.drafted[-2])
        identity = Identity("s", 1, 1, self.num_rounds, 1)
        rows = num_asked + 1
        step_ns = round((20 + 0.1 * rows) * MS)
        if not num_asked:
            self.length.decoded(Tokens(identity, (1,), 0, 0, False, step_ns=step_ns, step_rows=1), step_ns)
            return 0
        accepted = 0
        while accepted < num_asked:
            self.credit += self.acceptance
            if self.credit < 1.0:
                break
            self.credit -= 1.0
            accepted += 1
        draft_ns = round(num_asked * self.token_ms * MS)
        proposed = Proposed(identity, Proposal(1, (1,) * num_asked), Timings(forward_ns=draft_ns, total_ns=draft_ns))
        verified = Tokens(identity, (1,) * (accepted + 1), accepted, num_asked, True, step_ns=step_ns, step_rows=rows)
        self.length.round(num_asked, proposed, verified, draft_ns + step_ns)
        return num_asked


def test_a_useless_drafter_is_left_and_probed_ever_more_rarely_within_a_percent() -> None:
    run = Run(LengthPolicy(), acceptance=0.0, token_ms=20.0)
    for _ in range(20_000):
        run.advance()
    settled = run.drafted[2000:]
    probes = [n for n, k in enumerate(settled) if k]
    assert all(k <= PROBE_LEN for k in settled)
    assert len(probes) >= 2
    assert 3 * len(probes) <= 0.01 * len(settled)
    assert max(probes[-1] - probes[-2], 1) >= 0.5 * MAX_BACKOFF * 100


def test_a_drafter_that_becomes_good_is_found_by_the_probes() -> None:
    run = Run(LengthPolicy(), acceptance=0.0, token_ms=2.0)
    for _ in range(3000):
        run.advance()
    run.acceptance = 0.9
    for _ in range(6000):
        run.advance()
    assert min(run.drafted[-200:]) >= 4


def test_only_one_sequence_of_a_pool_probes_at_a_time() -> None:
    policy = LengthPolicy()
    runs = [Run(policy, acceptance=0.0, token_ms=20.0) for _ in range(8)]
    for _ in range(3000):
        for run in runs:
            run.advance()
    assert not policy.choice.depth
    turns = list(zip(*[run.drafted[500:] for run in runs], strict=True))
    assert max(sum(k > 0 for k in turn) for turn in turns) == 1
    assert sum(sum(turn) for turn in turns) > 0


def test_a_sequence_that_ends_while_it_probes_leaves_the_probe_to_others() -> None:
    policy = LengthPolicy()
    first, second = (Run(policy, acceptance=0.0, token_ms=20.0) for _ in range(2))
    for _ in range(400):
        first.advance()
        second.advance()
    while not policy.probes.grant(first.length):
        first.advance()
        second.advance()
    first.length.close()
    for _ in range(30_000):
        second.advance()
        if second.drafted[-1]:
            return
    pytest.fail("nobody probed again")


def test_a_hopeless_sequence_among_good_ones_decodes_alone() -> None:
    policy = LengthPolicy()
    good = [Run(policy, acceptance=0.9, token_ms=4.0) for _ in range(5)]
    hopeless = Run(policy, acceptance=0.0, token_ms=4.0)
    for _ in range(600):
        for run in (*good, hopeless):
            run.advance()
    assert all(min(run.drafted[-100:]) >= 4 for run in good)
    assert sum(k > 0 for k in hopeless.drafted[-300:]) < 30


@pytest.mark.parametrize(("num_sequences", "most"), [(32, len(STOPS)), (12, 12)])
def test_many_sequences_draft_one_of_few_lengths_so_that_they_travel_together(num_sequences: int, most: int) -> None:
    policy = LengthPolicy()
    last = num_sequences - 1
    runs = [Run(policy, acceptance=0.6 + 0.35 * n / last, token_ms=0.1) for n in range(num_sequences)]
    for _ in range(100):
        lengths = {run.advance() for run in runs} - {0}
    assert 1 < len(lengths) <= most
    assert (len(lengths) > len(STOPS)) == (most > len(STOPS))
