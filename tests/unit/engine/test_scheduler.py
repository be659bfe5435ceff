"""Order of a step, and who gives way when the pool is full."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.values import Proposal
from services.engine.block_manager import BlockManager
from services.engine.scheduler import MAX_STRETCH, MIN_PREFILL_BUDGET, NUM_YOUNG_TOKENS, Demand, Scheduler
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.step_times import StepTimes
from tests.unit.item_builders import open_item


def sequence_of(blocks: BlockManager, num_tokens: int, num_cached: int = 0) -> Sequence:
    sequence = Sequence.from_open(open_item(prefix=tuple(range(num_tokens))))
    if num_cached:
        blocks.extend(sequence, num_cached)
        sequence.num_cached = num_cached
    return sequence


def free_prefill() -> StepTimes:
    """Times by which prefill costs nothing, so that the budget is the largest."""
    times = StepTimes()
    times.observe(1, 0, 1000)
    times.observe(1, 100, 1000)
    return times


def decoding(sequence: Sequence, drafted: tuple[int, ...] = ()) -> Demand:
    return Demand(sequence, awaited=True, wants_row=True, proposal=Proposal(0, drafted) if drafted else None)


def shape(works: list[Work]) -> list[tuple[int, int]]:
    return [(work.num_new_tokens, work.num_rows) for work in works]


def test_rows_come_before_prefill_chunks_of_older_sequences() -> None:
    blocks = BlockManager(100, 4)
    prefilling, running = sequence_of(blocks, 100), sequence_of(blocks, 9, num_cached=8)
    works = Scheduler(blocks, 30, free_prefill()).plan([decoding(prefilling), decoding(running, (5, 6))])
    assert [work.sequence for work in works] == [running, prefilling]
    assert shape(works) == [(1, 3), (30, 0)]


def test_prefill_budget_is_spent_in_order_of_opening() -> None:
    blocks = BlockManager(100, 4)
    demands = [decoding(sequence_of(blocks, 40)) for _ in range(3)]
    works = Scheduler(blocks, 50).plan(demands)
    assert [work.sequence for work in works] == [demands[0].sequence, demands[1].sequence]
    assert shape(works) == [(40, 1), (10, 0)]


def test_prefix_that_nobody_waits_for_is_cached_but_for_its_last_token() -> None:
    blocks = BlockManager(100, 4)
    assert shape(Scheduler(blocks).plan([Demand(sequence_of(blocks, 10))])) == [(9, 0)]


def test_nothing_is_planned_for_a_cached_sequence_that_nobody_waits_for() -> None:
    blocks = BlockManager(100, 4)
    demands = [Demand(sequence_of(blocks, 10, num_cached=9))]
    assert not Scheduler(blocks).has_work(demands)
    assert Scheduler(blocks).plan(demands) == []


def test_full_pool_preempts_the_newest_for_an_older_row() -> None:
    blocks = BlockManager(6, 4)
    sequences = [sequence_of(blocks, 9, num_cached=8) for _ in range(3)]
    works = Scheduler(blocks).plan([decoding(sequence) for sequence in sequences])
    assert [work.sequence for work in works] == sequences[:2]
    assert sequences[2].num_cached == 0
    assert sequences[2].block_table == []
    blocks.check_integrity(sequences)


def test_row_waits_rather_than_preempt_older_sequences_while_others_run() -> None:
    blocks = BlockManager(5, 4)
    running, idle, newest = (sequence_of(blocks, n, num_cached=n - 1) for n in (6, 6, 5))
    works = Scheduler(blocks).plan([decoding(running), decoding(newest)], sequences=[running, idle, newest])
    assert [work.sequence for work in works] == [running]
    assert idle.num_cached == 5


def test_only_waiting_sequence_preempts_an_older_idle_one() -> None:
    blocks = BlockManager(4, 4)
    idle, newest = sequence_of(blocks, 13, num_cached=12), sequence_of(blocks, 8)
    works = Scheduler(blocks).plan([decoding(newest)], sequences=[idle, newest])
    assert shape(works) == [(8, 1)]
    assert idle.block_table == []


def test_row_preempts_the_newest_of_all_that_are_open_behind_it() -> None:
    blocks = BlockManager(7, 4)
    older, running, idle, newest = (sequence_of(blocks, n, num_cached=n - 1) for n in (5, 9, 9, 9))
    works = Scheduler(blocks).plan([decoding(running)], sequences=[older, running, idle, newest])
    assert [work.sequence for work in works] == [running]
    assert [sequence.num_cached for sequence in (older, idle, newest)] == [4, 8, 0]
    blocks.check_integrity([older, running, idle, newest])


def test_prefill_holds_all_its_blocks_from_the_first_chunk_on() -> None:
    blocks = BlockManager(10, 4)
    sequence = sequence_of(blocks, 37)
    Scheduler(blocks, 4).plan([decoding(sequence)])
    assert len(sequence.block_table) == 10


def test_newer_prefill_does_not_overtake_one_that_finds_no_room() -> None:
    blocks = BlockManager(8, 4)
    running, long, short = sequence_of(blocks, 13, num_cached=12), sequence_of(blocks, 32), sequence_of(blocks, 4)
    works = Scheduler(blocks).plan([decoding(running), decoding(long), decoding(short)])
    assert [work.sequence for work in works] == [running]


def test_prefill_that_nobody_waits_for_takes_only_free_blocks() -> None:
    blocks = BlockManager(4, 4)
    idle, eager = sequence_of(blocks, 13, num_cached=12), sequence_of(blocks, 8)
    assert not Scheduler(blocks).has_work([Demand(idle), Demand(eager)])
    assert Scheduler(blocks).plan([Demand(idle), Demand(eager)]) == []
    assert idle.num_cached == 12


def test_there_is_no_work_where_the_first_in_line_finds_no_room() -> None:
    blocks = BlockManager(4, 4)
    idle, long, short = sequence_of(blocks, 9, num_cached=8), sequence_of(blocks, 13), sequence_of(blocks, 5)
    demands = [Demand(idle), Demand(long), Demand(short)]
    assert not Scheduler(blocks).has_work(demands)
    assert Scheduler(blocks).plan(demands) == []


@given(
    num_blocks=st.integers(4, 12),
    held=st.lists(st.tuples(st.integers(2, 16), st.booleans(), st.booleans(), st.booleans()), max_size=5),
)
def test_there_is_work_exactly_where_a_step_would_be_planned(
    num_blocks: int, held: list[tuple[int, bool, bool, bool]]
) -> None:
    blocks = BlockManager(num_blocks, 4)
    demands = []
    for num_tokens, cached, awaited, wants_row in held:
        fits = cached and blocks.num_blocks_for(num_tokens - 1) <= blocks.num_free_blocks
        sequence = sequence_of(blocks, num_tokens, num_cached=num_tokens - 1 if fits else 0)
        demands.append(Demand(sequence, awaited=awaited, wants_row=awaited and wants_row))
    scheduler = Scheduler(blocks, 8)
    assert scheduler.has_work(demands) == bool(scheduler.plan(demands))


def shared_prefix(blocks: BlockManager, num_tokens: int) -> Sequence:
    """A sequence whose tokens are cached but for the last, and in the prefix index."""
    sequence = sequence_of(blocks, num_tokens)
    blocks.attach_prefix(sequence)
    blocks.extend(sequence, num_tokens - 1)
    sequence.num_cached = num_tokens - 1
    blocks.share(sequence)
    return sequence


def test_sequence_without_blocks_starts_behind_its_cached_prefix() -> None:
    blocks = BlockManager(20, 4)
    blocks.free(shared_prefix(blocks, 30))
    second = sequence_of(blocks, 33)
    assert shape(Scheduler(blocks).plan([decoding(second)])) == [(5, 1)]
    assert second.num_cached == 28


def test_prefix_in_use_lets_a_sequence_in_that_would_not_fit_without() -> None:
    blocks = BlockManager(10, 4)
    first, second = shared_prefix(blocks, 30), sequence_of(blocks, 33)
    works = Scheduler(blocks, times=free_prefill()).plan([decoding(first), decoding(second)])
    assert [work.sequence for work in works] == [first, second]
    assert first.block_table[:7] == second.block_table[:7]
    blocks.check_integrity([first, second])


def test_preempted_sequence_comes_back_from_its_own_blocks() -> None:
    blocks = BlockManager(16, 4)
    old, new = shared_prefix(blocks, 30), shared_prefix(blocks, 26)
    blocks.free(new)
    assert shape(Scheduler(blocks).plan([Demand(old), decoding(new)])) == [(2, 1)]


def test_preemption_goes_on_behind_a_sequence_that_only_shares() -> None:
    blocks = BlockManager(10, 4)
    oldest, sharer = shared_prefix(blocks, 29), shared_prefix(blocks, 29)
    assert blocks.num_used_blocks == 7
    runner = sequence_of(blocks, 12, num_cached=11)
    works = Scheduler(blocks).plan([decoding(oldest), decoding(runner), decoding(sharer)])
    assert [work.sequence for work in works] == [oldest]
    assert (sharer.block_table, runner.block_table) == ([], [])
    blocks.check_integrity([oldest, sharer, runner])


def test_nobody_is_preempted_for_blocks_that_stay_in_use() -> None:
    blocks = BlockManager(9, 4)
    oldest, row, sharer = sequence_of(blocks, 8, num_cached=7), shared_prefix(blocks, 21), shared_prefix(blocks, 21)
    works = Scheduler(blocks).plan([decoding(oldest), decoding(row, (1,) * 8), Demand(sharer)])
    assert [work.sequence for work in works] == [oldest]
    assert sharer.block_table == row.block_table


def test_prefill_beside_rows_takes_what_stretches_the_step_by_little() -> None:
    blocks, times = BlockManager(400, 4), StepTimes()
    times.observe(3, 0, 20_000)
    times.observe(3, 100, 40_000)
    prefilling, running = sequence_of(blocks, 1000), sequence_of(blocks, 9, num_cached=8)
    scheduler = Scheduler(blocks, 512, times)
    assert shape(scheduler.plan([decoding(prefilling), decoding(running, (5, 6))])) == [(1, 3), (60, 0)]
    assert shape(scheduler.plan([decoding(prefilling)], num_expected_rows=3)) == [(60, 0)]
    assert shape(scheduler.plan([decoding(prefilling)])) == [(512, 0)]


def test_steps_that_prefill_has_filled_with_rows_do_not_let_in_more_prefill() -> None:
    times = StepTimes()
    for num_rows in (1, 9, 1, 9):
        times.observe(num_rows, 0, 1000 * num_rows)
    times.observe(1, 100, 11_000)
    budgets = [Scheduler(BlockManager(100, 4), times=times).prefill_budget(num_rows) for num_rows in (3, 5, 50)]
    assert budgets == sorted(budgets)
    assert budgets[2] == int(MAX_STRETCH * times.mean_ns / 100) < int(MAX_STRETCH * times.rows_ns(50) / 100)


def test_prefill_goes_on_beside_rows_however_much_it_costs() -> None:
    blocks, times = BlockManager(400, 4), StepTimes()
    times.observe(3, 0, 1_000)
    times.observe(3, 100, 1_000_000)
    prefilling, running = sequence_of(blocks, 1000), sequence_of(blocks, 9, num_cached=8)
    works = Scheduler(blocks, 512, times).plan([decoding(prefilling), decoding(running)])
    assert shape(works) == [(1, 1), (MIN_PREFILL_BUDGET, 0)]


@pytest.mark.parametrize("seed", range(20))
def test_prefill_beside_rows_grows_by_steps_where_the_device_is_noisy(seed: int) -> None:
    """An estimate by chance near zero must not let a whole budget in: rows would wait for it."""
    blocks, times, random = BlockManager(1000, 4), StepTimes(), Random(seed)
    scheduler = Scheduler(blocks, 512, times)
    running, prefilling = sequence_of(blocks, 9, num_cached=8), sequence_of(blocks, 3000)
    for _ in range(20):
        times.observe(1, 0, round(20_000 * random.lognormvariate(0, 0.3)))
    chunks = []
    while prefilling.num_uncached_tokens > 600:
        [_, work] = scheduler.plan([decoding(running), decoding(prefilling)])
        chunks.append(work.num_new_tokens)
        prefilling.num_cached += work.num_new_tokens
        times.observe(1, work.num_new_tokens, round(20_000 * random.lognormvariate(0, 0.3)) + 200 * chunks[-1])
    affordable = 0.6 * 20_000 / 200
    assert max(chunks) < 4 * affordable
    assert len(chunks) < 3 * 2400 / affordable


def test_a_first_prompt_that_came_before_any_rows_does_not_keep_later_ones_out() -> None:
    """Later ones may be cached but for a few tokens, and then measure no prefill that could correct it."""
    times = StepTimes()
    times.observe(0, 33, 450_000)
    for num_rows in (374, 396, 484):
        times.observe(num_rows, 0, 450_000 + num_rows)
    assert Scheduler(BlockManager(100, 4), 512, times).prefill_budget(400) == 512


def test_rows_go_alone_until_it_is_known_what_they_take() -> None:
    """Else prefill that never pauses would stay at its least: what it may add is measured by steps of rows alone."""
    blocks, times = BlockManager(400, 4), StepTimes()
    scheduler = Scheduler(blocks, 512, times)
    running, prefilling = sequence_of(blocks, 20, 19), sequence_of(blocks, 300)
    demands = [decoding(running), decoding(prefilling)]
    assert shape(scheduler.plan(demands)) == [(1, 1)]
    times.observe(1, 0, 20_000)
    times.observe(1, 100, 40_000)
    assert shape(scheduler.plan(demands)) == [(1, 1), (300, 1)]


def test_prompts_that_come_beside_young_sequences_are_prefilled_whole() -> None:
    blocks, times = BlockManager(400, 4), StepTimes()
    times.observe(3, 0, 20_000)
    times.observe(3, 100, 40_000)
    young, grown = (sequence_of(blocks, n, num_cached=n - 1) for n in (9, 9 + NUM_YOUNG_TOKENS))
    young.prompt_len = grown.prompt_len = 9
    prompts = [decoding(sequence_of(blocks, n)) for n in (1000, 200, 100)]
    scheduler = Scheduler(blocks, 400, times)
    long, *rest = scheduler.plan([decoding(young), *prompts])[1:]
    assert long.num_new_tokens < 100
    assert shape(rest) == [(200, 1), (100, 1)]
    for work in (long, *rest):
        blocks.free(work.sequence)
    beside_grown = scheduler.plan([decoding(young), decoding(grown), *prompts])
    assert sum(work.num_new_tokens for work in beside_grown) < 100
