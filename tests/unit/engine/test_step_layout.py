"""Where the tokens of a step come from and go to."""

from __future__ import annotations

import torch

from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.step_layout import MAX_SHORT_ROWS, StepLayout, build_layout


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
    assert step.groups[0].rows is None
    assert step.output_rows is None


def test_padding_rows_are_at_position_zero_and_padding_blocks_are_block_zero() -> None:
    long, short = sequence([1] * 6, 4, [3, 9]), sequence([2], 0, [8])
    (group,) = layout([Work(long, 2, None, 1), Work(short, 1, None, 1)]).groups
    assert group.row_positions.tolist() == [[4, 5], [0, 0]]
    assert group.blocks.tolist() == [[3, 9], [8, 0]]


def test_every_token_is_found_again_behind_the_groups() -> None:
    sizes = [1, MAX_SHORT_ROWS + 5, 3, MAX_SHORT_ROWS + 1, MAX_SHORT_ROWS]
    works = [Work(sequence([0] * n, 0, list(range(40))), n) for n in sizes]
    step = layout(works)
    assert [(group.batch, group.max_rows) for group in step.groups] == [(3, MAX_SHORT_ROWS), (2, MAX_SHORT_ROWS + 5)]
    rows = torch.cat([group.rows for group in step.groups])
    assert rows[step.output_rows].tolist() == list(range(sum(sizes)))
