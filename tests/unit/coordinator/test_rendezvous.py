"""Bounded-load rendezvous hashing: what holds for all loads, keys and orders."""

from __future__ import annotations

import math
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.rendezvous import (
    LOAD_FACTOR,
    NUM_PREFIX_TOKENS,
    Candidate,
    bounded_choice,
    prefix_key,
)

NAMES = [f"10.0.0.{n}:50053" for n in range(12)]
ROOM = 10_000

loads = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 400), min_size=1)
keys = st.binary(min_size=1, max_size=8)


def candidates(loads: dict[str, int], room: int = ROOM) -> list[Candidate]:
    return [Candidate(name, load, room) for name, load in loads.items()]


def choose(key: bytes, loads: dict[str, int], room: int = ROOM) -> str:
    chosen = bounded_choice(key, candidates(loads, room))
    assert chosen is not None
    return chosen.name


@given(loads, keys, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(
    loads: dict[str, int], key: bytes, shuffler: random.Random
) -> None:
    shuffled = candidates(loads)
    shuffler.shuffle(shuffled)
    assert bounded_choice(key, shuffled) == bounded_choice(key, candidates(loads))


@given(loads, keys)
def test_the_chosen_one_is_below_the_bound(loads: dict[str, int], key: bytes) -> None:
    bound = math.ceil(LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads))
    assert loads[choose(key, loads)] + 1 <= bound


@given(st.lists(keys, max_size=200), st.integers(1, 8))
def test_no_worker_is_ever_filled_above_the_bound(all_keys: list[bytes], num_workers: int) -> None:
    placed = dict.fromkeys(NAMES[:num_workers], 0)
    for number, key in enumerate(all_keys, 1):
        placed[choose(key, placed)] += 1
        assert max(placed.values()) <= math.ceil(LOAD_FACTOR * number / num_workers)


@given(loads, keys)
def test_a_worker_that_is_below_the_bound_and_preferred_when_idle_gets_it(loads: dict[str, int], key: bytes) -> None:
    """Brute force: walk the workers in the order in which they are preferred when idle."""
    bound, idle = math.ceil(LOAD_FACTOR * (sum(loads.values()) + 1) / len(loads)), dict.fromkeys(loads, 0)
    while loads[preferred := choose(key, idle)] >= bound:
        del idle[preferred]
    assert choose(key, loads) == preferred


@given(st.lists(keys, min_size=1, max_size=100), st.sampled_from(NAMES))
def test_a_worker_that_leaves_moves_its_own_share_only(all_keys: list[bytes], gone: str) -> None:
    idle = dict.fromkeys(NAMES, 0)
    rest = {name: 0 for name in NAMES if name != gone}
    for key in all_keys:
        before = choose(key, idle)
        assert before == gone or choose(key, rest) == before


@given(loads, keys)
def test_full_workers_are_passed_over_unless_all_are(loads: dict[str, int], key: bytes) -> None:
    room = sorted(loads.values())[len(loads) // 2]
    chosen = choose(key, loads, room)
    assert loads[chosen] < room or min(loads.values()) >= room


def test_prefixes_spread_evenly_and_only_their_beginning_counts() -> None:
    idle = dict.fromkeys(NAMES[:4], 0)
    counts = Counter(choose(prefix_key([n, n + 1]), idle) for n in range(2000))
    assert min(counts.values()) > 400
    prefix = list(range(NUM_PREFIX_TOKENS))
    assert prefix_key(prefix) == prefix_key([*prefix, 7])
    assert prefix_key(prefix) != prefix_key([7, *prefix[1:]])
    assert bounded_choice(b"", []) is None
