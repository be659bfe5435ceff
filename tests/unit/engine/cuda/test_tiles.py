"""Where the tokens of a step in tiles come from and go to, and what padding adds."""

from __future__ import annotations

import numpy as np
import torch

from services.common.values import Proposal
from services.engine.cuda.tiles import StepPlan, StepShape, StepTensors, TileGroup
from services.engine.step import Work
from services.engine.step_layout import build_layout
from tests.unit.engine.cuda.step_builders import sequence, works


def test_tokens_slots_and_rows_are_those_of_the_plain_layout() -> None:
    step = works([(19, 5), (0, 1), (16, 40), (3, 2)], 4, 40)
    step.append(Work(sequence([7, 8, 9], 0, [39]), 2))
    plan, layout = StepPlan.of(step, 4), build_layout(step, 4, torch.device("cpu"))
    for mine, theirs in (
        (plan.token_ids, layout.token_ids),
        (plan.positions, layout.positions),
        (plan.slots, layout.slots),
        (plan.logit_rows, layout.logit_rows),
    ):
        assert mine.tolist() == theirs.tolist()


def test_works_are_tiled_by_the_lowest_height_that_holds_them() -> None:
    plan = StepPlan.of(works([(10, 1), (0, 35), (4, 5), (2, 2)], 4, 40), 4)
    low, middle, high = (tiles.tolist() for tiles in plan.tiles)
    starts = [0, 3, 12, 15]
    assert [group.tile_rows for group in plan.shape.groups] == [2, 8, 32]
    assert low == [[starts[0], 0, 1, 10], [starts[3], 41, 2, 2]]
    assert middle == [[starts[2], 36, 5, 4]]
    assert high == [[starts[1], 1, 32, 0], [starts[1], 33, 3, 32]]


def test_an_ungrouped_plan_has_one_height_for_all() -> None:
    plan = StepPlan.of(works([(10, 1), (4, 5)], 4, 40), 4, grouped=False)
    assert plan.shape.groups == (TileGroup(2, 8),)


def test_tables_stand_end_to_end_and_reach_over_the_computed_tokens() -> None:
    first = Work(sequence([1, 2, 3], 2, [7, 9, 11]), 1, Proposal(0, (4, 5)), 3)
    second = Work(sequence([1] * 8, 7, [5, 6]), 1, None, 1)
    assert StepPlan.of([first, second], 4).tables.tolist() == [7, 9, 5, 6]


def test_the_array_gives_back_the_parts_it_was_packed_from() -> None:
    plan = StepPlan.of(works([(19, 5), (0, 1), (16, 40)], 4, 40), 4)
    tensors = StepTensors.view(torch.from_numpy(plan.pack()), plan.shape)
    assert tensors.token_ids.tolist() == plan.token_ids.tolist()
    assert tensors.positions.tolist() == plan.positions.tolist()
    assert tensors.slots.tolist() == plan.slots.tolist()
    assert tensors.logit_rows.tolist() == plan.logit_rows.tolist()
    assert [tiles.tolist() for tiles in tensors.tiles] == [tiles.tolist() for tiles in plan.tiles]
    assert tensors.tables.tolist() == [*plan.tables.tolist(), 0]


def test_padding_writes_to_the_spare_block_and_covers_every_token_with_one_tile() -> None:
    plan = StepPlan.of(works([(10, 3), (4, 2)], 4, 40), 4, grouped=False)
    shape = StepShape(8, 8, (TileGroup(8, 8),))
    padded = plan.padded(shape, spare_slot=160, spare_block=40)
    assert padded.token_ids[5:].tolist() == [0, 0, 0]
    assert padded.slots.tolist() == [*plan.slots.tolist(), 160, 160, 160]
    assert padded.tables.tolist() == [*plan.tables.tolist(), 40]
    (tiles,) = padded.tiles
    covered = [row for _, first, num_rows, _ in tiles.tolist() for row in range(first, first + num_rows)]
    assert sorted(covered) == list(range(8))
    assert all(padded.tables[start] == 40 for start, first, num_rows, _ in tiles.tolist() if num_rows and first >= 5)


def test_the_plan_of_no_work_pads_to_a_step_of_the_spare_block_alone() -> None:
    padded = StepPlan.empty().padded(StepShape(4, 4, (TileGroup(4, 2),)), spare_slot=12, spare_block=3)
    assert padded.slots.tolist() == [12] * 4
    assert padded.tables.tolist() == [3]
    assert np.array_equal(padded.tiles[0], [[0, i, 1, 0] for i in range(4)])
