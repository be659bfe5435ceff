"""A step is computed with the number of threads that has lately been faster, and a neighbour's coming is noticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.engine.thread_choice import FIRST_INTERVAL, FIRST_WAIT, MAX_INTERVAL, ThreadChoice

MS = 1_000_000


def quiet(num_threads: int) -> int:
    """Milliseconds of a step while the machine has nothing else to do."""
    return {1: 24, 2: 18}[num_threads]


def shared(num_threads: int) -> int:
    """The same beside another process."""
    return {1: 27, 2: 440}[num_threads]


def run(choice: ThreadChoice, num_steps: int, ms: Callable[[int], int], num_tokens: int = 1) -> list[int]:
    """The threads of so many steps."""
    used = []
    for _ in range(num_steps):
        used.append(choice.num_threads(num_tokens))
        choice.observe(num_tokens, used[-1], ms(used[-1]) * MS)
    return used


def test_all_threads_at_first_and_while_they_are_faster() -> None:
    used = run(ThreadChoice(2), 20_000, quiet)
    assert used[:FIRST_WAIT] == [2] * FIRST_WAIT
    assert 1 <= used.count(1) <= 1 + 20_000 // MAX_INTERVAL


def test_half_of_them_after_two_late_steps() -> None:
    choice = ThreadChoice(2)
    run(choice, 100, quiet)
    used = run(choice, 12, shared)
    assert used.count(2) <= 2
    assert used[-9:] == [1] * 9


def test_all_again_once_the_neighbour_is_gone() -> None:
    choice = ThreadChoice(2)
    run(choice, 10, shared)
    assert run(choice, 2 * FIRST_INTERVAL, quiet)[-1] == 2


def test_a_neighbour_that_stays_costs_few_tries() -> None:
    choice = ThreadChoice(2)
    run(choice, 100, shared)
    used = run(choice, 10_000, shared)
    assert used.count(2) <= 8 + 10_000 // MAX_INTERVAL


def test_a_single_late_step_changes_nothing_but_one_try() -> None:
    choice = ThreadChoice(2)
    run(choice, 100, quiet)
    choice.observe(1, choice.num_threads(1), 300 * MS)
    assert run(choice, 100, quiet) == [1] + [2] * 99


def test_steps_of_other_sizes_are_learned_apart() -> None:
    choice = ThreadChoice(2)
    run(choice, 10, shared, num_tokens=1)
    assert choice.num_threads(1) == 1
    assert choice.num_threads(256) == 2


@pytest.mark.parametrize(("max_threads", "expected"), [(1, {1}), (2, {1, 2}), (3, {1, 3}), (16, {8, 16})])
def test_the_numbers_that_are_used(max_threads: int, expected: set[int]) -> None:
    assert set(run(ThreadChoice(max_threads), 100, lambda n: 10)) == expected
