"""The target under load, in virtual time: the hold, prefill beside rows, and fairness."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from tests.unit.target.simulation import Client, Simulation, tokens_per_s

STEP_MS = 20.0
ROW_MS = 0.05
GAP_S = 0.004


def staggered(num: int, gap_s: float, *, jitter: float = 0.2, stagger_s: float = 0.0017) -> list[Client]:
    """Clients that start one after the other and draft for about `gap_s`."""
    random = Random(1)
    return [
        Client(str(n), (n, 7), n * stagger_s, lambda: gap_s * random.uniform(1 - jitter, 1 + jitter))
        for n in range(num)
    ]


def rate(clients: list[Client], *, holds: bool = True) -> float:
    return tokens_per_s(Simulation(clients, step_ms=STEP_MS, row_ms=ROW_MS, holds=holds), 1.0, 4.0)


def lockstep(num: int, gap_s: float) -> list[Client]:
    return staggered(num, gap_s, jitter=0.0, stagger_s=0.0)


@pytest.mark.parametrize("jitter", [0.2, 0.5])
def test_staggered_sequences_reach_the_rate_of_lockstep_by_the_hold_only(jitter: float) -> None:
    best = rate(lockstep(16, GAP_S), holds=False)
    assert rate(staggered(16, GAP_S, jitter=jitter)) >= 0.9 * best
    assert rate(staggered(16, GAP_S, jitter=jitter), holds=False) <= 0.7 * best


@pytest.mark.parametrize("num", [4, 16])
@pytest.mark.parametrize("gap_ms", [25, 30, 45, 70])
def test_staggered_sequences_reach_the_rate_of_lockstep_with_gaps_longer_than_a_step(num: int, gap_ms: int) -> None:
    best = rate(lockstep(num, gap_ms / 1e3), holds=False)
    assert rate(staggered(num, gap_ms / 1e3, jitter=0.1, stagger_s=0.0137)) >= 0.9 * best


@pytest.mark.parametrize("gap_ms", [1, 4, 12, 18, 30])
@pytest.mark.parametrize("num", [2, 4])
def test_hold_is_never_worse_than_none(num: int, gap_ms: int) -> None:
    clients = [staggered(num, gap_ms / 1e3, stagger_s=0.0071) for _ in range(2)]
    assert rate(clients[0]) >= 0.97 * rate(clients[1], holds=False)


def test_single_sequence_is_never_held() -> None:
    simulation = Simulation(staggered(1, GAP_S), step_ms=STEP_MS)
    simulation.run(2.0)
    assert simulation.num_steps > 50
    assert simulation.longest_hold_s == 0.0


def round_trips_ms(simulation: Simulation) -> list[float]:
    """How long each item waited for its answer, in the second half of the run."""
    return [
        1e3 * (arrived_s - asked_s)
        for client in simulation.clients.values()
        for asked_s, arrived_s in zip(client.asked_s, client.arrivals_s, strict=False)
        if asked_s > simulation.time.now_s / 2
    ]


def test_light_load_is_not_delayed() -> None:
    means = []
    for holds in (True, False):
        simulation = Simulation(staggered(3, 0.3), step_ms=STEP_MS, holds=holds)
        simulation.run(12.0)
        trips = round_trips_ms(simulation)
        means.append(sum(trips) / len(trips))
    assert means[0] <= 1.01 * means[1]


def test_drafter_that_gets_stuck_does_not_slow_down_the_others() -> None:
    clients = staggered(4, GAP_S)
    stuck = clients[0]
    stuck.gap_s = lambda: GAP_S if stuck.num_tokens < 60 else 1e6
    simulation = Simulation(clients, step_ms=STEP_MS)
    simulation.run(4.0)
    assert 60 <= stuck.num_tokens < 70
    assert simulation.longest_hold_s <= STEP_MS / 1e3
    for client in clients[1:]:
        rounds_s = [later - former for former, later in pairwise(client.arrivals_s)]
        assert sum(rounds_s[-80:]) / 80 <= STEP_MS / 1e3 + 1.5 * GAP_S
        assert max(rounds_s[5:]) <= 2 * (STEP_MS / 1e3 + 1.5 * GAP_S)


LONG = tuple(index % 250 for index in range(4000))


def p99_ms(simulation: Simulation, from_s: float, until_s: float) -> float:
    """Inter-token latency of the clients other than `long`."""
    gaps = []
    for client in simulation.clients.values():
        times = [time_s for time_s in client.arrivals_s if from_s <= time_s <= until_s and client.name != "long"]
        gaps += [1e3 * (later - former) for former, later in pairwise(times)]
    return sorted(gaps)[int(0.99 * len(gaps))]


@pytest.mark.parametrize("gap_s", [None, 0.004, 0.03])
@pytest.mark.parametrize("num", [1, 8])
@pytest.mark.parametrize(("row_ms", "prefill_token_ms"), [(0.1, 0.25), (0.1, 0.02), (0.3, 1.0)])
def test_long_prefill_at_most_doubles_the_others_latency(
    num: int, gap_s: float | None, row_ms: float, prefill_token_ms: float
) -> None:
    def clients() -> list[Client]:
        if gap_s is not None:
            return staggered(num, gap_s, stagger_s=0.0137)
        return [Client(str(n), (n, 7), n * 0.0137, None) for n in range(num)]

    long = Client("long", LONG, 1.0, None, max_new_tokens=1)
    costs = {"step_ms": STEP_MS, "row_ms": row_ms, "prefill_token_ms": prefill_token_ms}
    alone, beside = Simulation(clients(), **costs), Simulation([*clients(), long], **costs)
    alone.run(3.0)
    while not long.is_done:
        beside.run(beside.time.now_s + 0.1)
        assert beside.time.now_s < 30.0
    assert p99_ms(beside, 1.0, long.arrivals_s[0]) <= 2.0 * p99_ms(alone, 1.0, 3.0)


@pytest.mark.parametrize("together", [True, False])
def test_prompts_that_come_together_are_answered_together(together: bool) -> None:
    """16 prompts of 40 tokens take 160 ms of prefill; nobody's first token comes long after that."""
    clients = [
        Client(str(n), tuple((n + index) % 250 for index in range(40)), n * (0.0 if together else 0.011), None)
        for n in range(16)
    ]
    simulation = Simulation(clients, step_ms=STEP_MS, prefill_token_ms=0.25)
    simulation.run(1.0)
    assert max(client.arrivals_s[0] - client.starts_s for client in clients) < 0.16 + 3 * STEP_MS / 1e3


def test_everybody_is_served_under_sustained_load() -> None:
    """Prompts arrive as fast as they can be computed, beside drafting and plain decoding sequences, in a small pool."""
    running: list[Client] = [*staggered(4, GAP_S), Client("plain", (9, 9), 0.0, None)]
    arriving = [
        Client(f"p{n}", tuple((n * 31 + index) % 250 for index in range(400)), 0.1 + 0.06 * n, None, max_new_tokens=8)
        for n in range(60)
    ]
    simulation = Simulation([*running, *arriving], step_ms=STEP_MS, row_ms=0.1, prefill_token_ms=0.02, num_blocks=1000)
    simulation.run(6.0)
    assert all(client.is_done for client in arriving)
    waits_s = [client.arrivals_s[0] - client.starts_s for client in arriving]
    assert max(waits_s) < 1.0
    for client in running:
        gaps = [later - former for former, later in pairwise(client.arrivals_s)]
        assert max(gaps) < 0.12
