"""What rank 0 computes is what the others are told to compute."""

from __future__ import annotations

import numpy as np
import pytest

from services.common.values import Proposal
from services.engine.cuda.tiles import StepPlan
from services.engine.sequence import Sequence
from services.engine.step import Work
from services.engine.tensor_parallel.message import pack, unpack
from tests.unit.item_builders import open_item


def work(num_tokens: int, num_cached: int, drafted: tuple[int, ...] = (), num_rows: int = 0) -> Work:
    """Computes all uncached tokens; the block table has room for more."""
    sequence = Sequence.from_open(open_item(prefix=tuple(range(5, 5 + num_tokens))))
    sequence.num_cached = num_cached
    sequence.block_table = list(range(num_tokens, 2 * num_tokens + 1))
    return Work(sequence, num_tokens - num_cached, Proposal(3, drafted) if drafted else None, num_rows)


@pytest.mark.parametrize(
    "works",
    [
        [work(9, 8, num_rows=1)],
        [work(9, 8, (4, 5, 6), 4), work(30, 29, num_rows=1)],
        [work(9, 8, (4, 5), 3), work(90, 3), work(50, 0, num_rows=1)],
        [work(70, 0)],
    ],
    ids=["one row", "rows of different lengths", "rows and prefill", "prefill without rows"],
)
def test_works_survive_the_message(works: list[Work]) -> None:
    told = unpack(np.frombuffer(pack(works).tobytes(), dtype=np.int64))
    for one, other in zip(told, works, strict=True):
        assert (one.num_new_tokens, one.drafted, one.num_rows) == (other.num_new_tokens, other.drafted, other.num_rows)
        assert one.sequence.block_table == other.sequence.block_table
    for plan, expected in zip(StepPlan.of(told, 4).pack(), StepPlan.of(works, 4).pack(), strict=True):
        assert plan == expected
    assert StepPlan.of(told, 4).shape == StepPlan.of(works, 4).shape


def test_a_part_of_the_uncached_tokens_is_sent_alone() -> None:
    whole = work(90, 3)
    (told,) = unpack(pack([Work(whole.sequence, 20)]))
    assert told.sequence.tokens[3:] == whole.sequence.tokens[3:23]
