"""The KV pool's accounts against a reference that only counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ResourceExhausted
from services.engine.block_manager import BlockManager, IntegrityError
from services.engine.sequence import Sequence
from tests.unit.item_builders import open_item


def new_sequence() -> Sequence:
    return Sequence.from_open(open_item())


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["extend", "truncate", "free"]), st.integers(0, 3), st.integers(0, 40)), max_size=60
)


@settings(deadline=None, max_examples=60)
@given(OPERATIONS, st.integers(1, 5))
def test_tables_cover_what_was_asked_and_account_for_every_block(
    operations: list[tuple[str, int, int]], block_size: int
) -> None:
    blocks = BlockManager(8, block_size)
    sequences = [new_sequence() for _ in range(4)]
    num_blocks = [0] * 4
    for operation, which, num_tokens in operations:
        sequence, needed = sequences[which], -(-num_tokens // block_size)
        if operation == "extend":
            fits = sum(num_blocks) - num_blocks[which] + max(needed, num_blocks[which]) <= 8
            assert blocks.can_extend(sequence, num_tokens) == fits
            if fits:
                blocks.extend(sequence, num_tokens)
                num_blocks[which] = max(needed, num_blocks[which])
            else:
                before = list(sequence.block_table)
                with pytest.raises(ResourceExhausted) as refusal:
                    blocks.extend(sequence, num_tokens)
                assert refusal.value.reason == "KV_POOL_FULL"
                assert refusal.value.retry_after_ms
                assert sequence.block_table == before
        elif operation == "truncate":
            blocks.truncate(sequence, num_tokens)
            num_blocks[which] = min(needed, num_blocks[which])
        else:
            blocks.free(sequence)
            num_blocks[which] = 0
        assert [len(s.block_table) for s in sequences] == num_blocks
        assert blocks.num_used_blocks == sum(num_blocks)
        blocks.check_integrity(sequences)


def test_truncate_keeps_the_blocks_in_front_and_cuts_num_cached() -> None:
    blocks, sequence = BlockManager(4, 4), new_sequence()
    blocks.extend(sequence, 13)
    table = list(sequence.block_table)
    sequence.num_cached = 13
    blocks.truncate(sequence, 5)
    assert sequence.block_table == table[:2]
    assert sequence.num_cached == 5


def test_truncate_never_raises_num_cached() -> None:
    blocks, sequence = BlockManager(4, 4), new_sequence()
    blocks.extend(sequence, 8)
    sequence.num_cached = 3
    blocks.truncate(sequence, 8)
    assert sequence.num_cached == 3


def test_integrity_check_finds_a_leaked_block() -> None:
    blocks, sequence = BlockManager(4, 4), new_sequence()
    blocks.extend(sequence, 8)
    with pytest.raises(IntegrityError):
        blocks.check_integrity([])


def test_integrity_check_finds_a_block_in_two_tables() -> None:
    blocks, sequence, thief = BlockManager(4, 4), new_sequence(), new_sequence()
    blocks.extend(sequence, 4)
    thief.block_table.append(sequence.block_table[0])
    with pytest.raises(IntegrityError):
        blocks.check_integrity([sequence, thief])


def test_integrity_check_finds_a_free_block_in_a_table() -> None:
    blocks, sequence = BlockManager(4, 4), new_sequence()
    blocks.extend(sequence, 4)
    table = list(sequence.block_table)
    blocks.free(sequence)
    sequence.block_table = table
    with pytest.raises(IntegrityError):
        blocks.check_integrity([sequence])


def test_integrity_check_finds_more_tokens_cached_than_blocks_hold() -> None:
    blocks, sequence = BlockManager(4, 4), new_sequence()
    blocks.extend(sequence, 4)
    sequence.num_cached = 5
    with pytest.raises(IntegrityError):
        blocks.check_integrity([sequence])
