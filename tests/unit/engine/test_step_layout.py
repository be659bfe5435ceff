"""Where the tokens of a step come from and go to."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.step_layout import GATHER_ROWS, MAX_GROUPS, StepLayout, build_layout, partition


def sequence(tokens: list[int], num_cached: int, block_table: list[int]) -> Sequence:
    identity = Identity("s", 0, 0, 0, len(tokens))
    opened = Sequence.from_open(
        Open(identity, tuple(tokens), 1, frozenset(), SamplingParams(), VerificationMethod.COUPLED, 10)
    )
    opened.num_cached = num_cached
    opened.block_table = block_table
    return opened


def layout(works: list[Work], block_size: int = 4) -> StepLayout:
    return build_layout(works, block_size, torch.device("cpu"))


def test_tokens_positions_and_slots_follow_the_cached_prefix() -> None:
    verify = Work(sequence([10, 11, 12, 13, 14], 3, [7, 2]), 2, Proposal(0, (90, 91)), 3)
    prefill = Work(sequence([20, 21, 22], 0, [5]), 2)
    step = layout([verify, prefill])
    assert step.token_ids.tolist() == [13, 14, 90, 91, 20, 21]
    assert step.positions.tolist() == [3, 4, 5, 6, 0, 1]
    assert step.slots.tolist() == [7 * 4 + 3, 2 * 4, 2 * 4 + 1, 2 * 4 + 2, 5 * 4, 5 * 4 + 1]
    assert step.logit_rows.tolist() == [1, 2, 3]


def test_equal_rows_need_no_rearranging() -> None:
    step = layout([Work(sequence([1, 2], 1, [i]), 1, None, 1) for i in range(3)])
    assert step.groups[0].rows == slice(0, 3)
    assert step.output_rows is None


def test_a_chunk_behind_rows_needs_no_rearranging() -> None:
    rows = [Work(sequence([1] * 40, 39, list(range(10))), 1, None, 1) for _ in range(4)]
    step = layout([*rows, Work(sequence([2] * 4000, 3000, list(range(1000))), 12)])
    assert [group.rows for group in step.groups] == [slice(0, 4), slice(4, 16)]
    assert step.output_rows is None


def test_padding_is_left_behind() -> None:
    step = layout([Work(sequence([1] * 9, 4, [1, 2, 3]), n, None, 1) for n in (5, 4)])
    assert step.groups[0].rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5]
    assert step.output_rows.tolist() == list(range(9))


def test_padding_rows_are_at_position_zero_and_padding_blocks_are_the_sequences_own() -> None:
    long, other, short = sequence([1] * 6, 4, [3, 9]), sequence([1] * 6, 4, [5, 6]), sequence([2], 0, [8])
    (group,) = layout([Work(long, 2, None, 1), Work(other, 2, None, 1), Work(short, 1, None, 1)]).groups
    assert group.row_positions.tolist() == [[4, 5], [4, 5], [0, 0]]
    assert group.blocks.tolist() == [[3, 9], [5, 6], [8, 8]]


def test_every_token_is_found_again_behind_the_groups() -> None:
    sizes = [1, 70, 3, 66, 2]
    works = [Work(sequence([0] * n, 0, list(range(40))), n) for n in sizes]
    step = layout(works)
    assert [(group.batch, group.max_rows) for group in step.groups] == [(3, 3), (2, 70)]
    rows = torch.cat([group.rows for group in step.groups])
    assert rows[step.output_rows].tolist() == list(range(sum(sizes)))


def test_short_chunk_of_a_long_prompt_does_not_pad_the_rows_beside_it() -> None:
    rows, blocks = np.array([1, 12, 1, 5, 1]), np.array([10, 250, 12, 11, 9])
    assert [group.tolist() for group in partition(rows, blocks)] == [[0, 2, 3, 4], [1]]


def test_works_of_like_size_stay_together() -> None:
    assert [group.tolist() for group in partition(np.array([5] * 16), np.arange(20, 36))] == [list(range(16))]


@given(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=40))
def test_groups_are_few_and_hold_every_work_once(sizes: list[tuple[int, int]]) -> None:
    rows, blocks = np.array(sizes).T
    groups = partition(rows, blocks)
    assert 1 <= len(groups) <= MAX_GROUPS
    assert sorted(index for group in groups for index in group.tolist()) == list(range(len(sizes)))

    def padded(group: list[int]) -> int:
        return len(group) * int(blocks[group].max()) * (int(rows[group].max()) + GATHER_ROWS)

    assert sum(padded(group.tolist()) for group in groups) <= padded(list(range(len(sizes))))
