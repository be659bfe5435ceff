"""The KV pool's accounts and its prefix index, against a reference that knows tokens only."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ResourceExhausted
from services.common.values import ModelInfo
from services.engine.block_manager import BlockManager, IntegrityError
from services.engine.prefix_cache import PrefixCache, model_key
from services.engine.sequence import Sequence
from tests.unit.item_builders import open_item


def new_sequence() -> Sequence:
    return Sequence.from_open(open_item())


class Reference:
    """What must be cached, by tokens instead of hashes and blocks: no reference counts, no tables, no free list."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.shared: dict[int, int] = {}
        """Of each open sequence: its number of shared blocks."""
        self.own: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.unused: list[tuple[int, ...]] = []
        """Cached prefixes that no open sequence uses, least recently used first."""

    def prefix(self, which: int, num_blocks: int) -> tuple[int, ...]:
        return tuple(self.tokens[which][: num_blocks * self.block_size])

    @property
    def used(self) -> set[tuple[int, ...]]:
        return {self.prefix(which, n + 1) for which, num in self.shared.items() for n in range(num)}

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self.used) - sum(self.own.values())

    def attach(self, which: int, num_committed: int) -> int:
        num = 0
        while (num + 1) * self.block_size <= num_committed - 2:
            prefix = self.prefix(which, num + 1)
            if prefix not in self.used and prefix not in self.unused:
                break
            num += 1
        self.shared[which] = num
        self.unused = [prefix for prefix in self.unused if prefix not in self.used]
        return num * self.block_size

    def extend(self, which: int, num_tokens: int) -> bool:
        missing = max(0, -(-num_tokens // self.block_size) - self.shared[which] - self.own[which])
        if missing > self.num_free:
            return False
        self.own[which] += missing
        del self.unused[: max(0, len(self.unused) - self.num_free)]
        return True

    def share(self, which: int, num_tokens: int) -> None:
        num_new = num_tokens // self.block_size - self.shared[which]
        if num_new > 0:
            self.shared[which] += num_new
            self.own[which] -= num_new
            self.unused = [prefix for prefix in self.unused if prefix not in self.used]

    def free(self, which: int) -> None:
        prefixes = [self.prefix(which, n + 1) for n in range(self.shared[which])]
        self.shared[which] = self.own[which] = 0
        self.unused += [prefix for prefix in reversed(prefixes) if prefix not in self.used]


class Pool:
    """A BlockManager whose blocks have contents: behind which tokens each slot was written."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.reference = Reference(num_blocks, block_size)
        self.sequences = [new_sequence() for _ in range(4)]
        self.contents: dict[tuple[int, int], tuple[int, ...]] = {}
        for which in range(4):
            self.open(which, (0,))

    def open(self, which: int, prefix: tuple[int, ...]) -> None:
        """A new sequence in place of an older one, whose committed prefix stays cached."""
        if which in self.reference.tokens:
            self.share(which)
            self.free(which)
        self.sequences[which] = Sequence.from_open(open_item(prefix=prefix))
        self.reference.tokens[which] = self.sequences[which].tokens
        self.reference.shared[which] = self.reference.own[which] = 0

    def compute(self, which: int, num_tokens: int) -> None:
        """Writes the next `num_tokens` tokens, as far as there are any and the pool has room."""
        sequence, size = self.sequences[which], self.blocks.block_size
        if not sequence.block_table:
            expected = self.reference.attach(which, sequence.num_committed)
            self.blocks.attach_prefix(sequence)
            assert sequence.num_cached == expected
        end = min(len(sequence), sequence.num_cached + num_tokens)
        can_extend, table = self.blocks.can_extend(sequence, end), list(sequence.block_table)
        assert can_extend == self.reference.extend(which, end)
        if not can_extend:
            with pytest.raises(ResourceExhausted) as refusal:
                self.blocks.extend(sequence, end)
            assert (refusal.value.reason, bool(refusal.value.retry_after_ms)) == ("KV_POOL_FULL", True)
            assert sequence.block_table == table
            return
        self.blocks.extend(sequence, end)
        for index in range(sequence.num_cached, end):
            slot = (sequence.block_table[index // size], index % size)
            self.contents[slot] = tuple(sequence.tokens[: index + 1])
        sequence.num_cached = end

    def grow(self, which: int, num_committed: int, num_drafted: int) -> None:
        """Commits tokens behind the committed ones, in place of those drafted; then drafts others."""
        sequence = self.sequences[which]
        num_kept = sequence.num_committed - (sequence.num_cached == sequence.num_committed)
        self.blocks.truncate(sequence, num_kept)
        self.reference.own[which] = len(sequence.block_table) - self.reference.shared[which]
        del sequence.tokens[sequence.num_committed :]
        sequence.tokens += [len(sequence) % 2] * num_committed
        sequence.confirm(len(sequence))
        sequence.tokens += [7] * num_drafted

    def share(self, which: int) -> None:
        sequence = self.sequences[which]
        self.blocks.share(sequence)
        self.reference.share(which, min(sequence.num_cached, sequence.num_committed - 1))

    def free(self, which: int) -> None:
        self.blocks.free(self.sequences[which])
        self.reference.free(which)

    def check(self) -> None:
        self.blocks.check_integrity(self.sequences)
        assert self.blocks.num_free_blocks == self.reference.num_free
        size = self.blocks.block_size
        for which, sequence in enumerate(self.sequences):
            assert sequence.num_shared_blocks == self.reference.shared[which]
            for index in range(sequence.num_cached):
                slot = (sequence.block_table[index // size], index % size)
                assert self.contents[slot] == tuple(sequence.tokens[: index + 1])


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "compute", "compute", "grow", "share", "free"]),
        st.integers(0, 3),
        st.integers(0, 20),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=250)
@given(OPERATIONS, st.integers(1, 4), st.integers(1, 12))
def test_blocks_hold_what_their_tables_say_and_are_shared_and_evicted_as_the_reference_says(
    operations: list[tuple[str, int, int, int]], block_size: int, num_blocks: int
) -> None:
    pool = Pool(num_blocks, block_size)
    for operation, which, num, num_drafted in operations:
        if operation == "open":
            pool.open(which, tuple(index % 2 * (num % 3 == 0) for index in range(1 + num)))
        elif operation == "compute":
            pool.compute(which, num)
        elif operation == "grow":
            pool.grow(which, num % 6, num_drafted)
        elif operation == "share":
            pool.share(which)
        else:
            pool.free(which)
        pool.check()


def cached_sequence(blocks: BlockManager, tokens: tuple[int, ...], salt: bytes = b"") -> Sequence:
    """A sequence whose tokens are all cached but for the last, and shared."""
    sequence = Sequence.from_open(replace(open_item(prefix=tokens), cache_salt=salt))
    blocks.attach_prefix(sequence)
    blocks.extend(sequence, len(tokens))
    sequence.num_cached = len(tokens) - 1
    blocks.share(sequence)
    return sequence


def hit_len(blocks: BlockManager, tokens: tuple[int, ...], salt: bytes = b"") -> int:
    """How many of the tokens are found cached."""
    sequence = Sequence.from_open(replace(open_item(prefix=tokens), cache_salt=salt))
    blocks.attach_prefix(sequence)
    num_cached = sequence.num_cached
    blocks.free(sequence)
    return num_cached


TOKENS = tuple(range(20))


def test_prefix_is_found_up_to_the_first_other_token() -> None:
    blocks = BlockManager(16, 4)
    blocks.free(cached_sequence(blocks, TOKENS))
    assert hit_len(blocks, TOKENS) == 16
    assert hit_len(blocks, (*TOKENS[:9], 99, *TOKENS[10:])) == 8
    assert hit_len(blocks, (99, *TOKENS[1:])) == 0


def test_blocks_of_equal_tokens_behind_other_prefixes_are_not_mixed_up() -> None:
    blocks = BlockManager(16, 4)
    blocks.free(cached_sequence(blocks, (*TOKENS[:4], *TOKENS[8:12], 1)))
    assert hit_len(blocks, (*TOKENS[8:12], *TOKENS[8:12], 1, 2)) == 0


def test_two_tokens_stay_to_be_computed() -> None:
    blocks = BlockManager(16, 4)
    blocks.free(cached_sequence(blocks, TOKENS))
    assert [hit_len(blocks, TOKENS[:num]) for num in (1, 8, 9, 10)] == [0, 4, 4, 8]


def test_salts_and_models_share_nothing() -> None:
    blocks = BlockManager(16, 4)
    blocks.free(cached_sequence(blocks, TOKENS, b"tenant"))
    assert (hit_len(blocks, TOKENS), hit_len(blocks, TOKENS, b"tenant")) == (0, 16)
    info = ModelInfo("m", "digest", "", 8, "float32", "cpu")
    keys = {model_key(info), model_key(replace(info, digest="other")), model_key(replace(info, dtype="bfloat16"))}
    sequence = Sequence.from_open(open_item(prefix=TOKENS))
    hashes = set()
    for key in keys:
        sequence.block_hashes.clear()
        hashes.add(PrefixCache(4, key).hash_of(sequence, 0))
    assert len(hashes) == 3


def test_second_sequence_of_equal_tokens_gives_its_own_blocks_back() -> None:
    blocks = BlockManager(16, 4)
    first, second = (Sequence.from_open(open_item(prefix=TOKENS)) for _ in range(2))
    for sequence in (first, second):
        blocks.extend(sequence, 20)
        sequence.num_cached = 19
    assert blocks.num_used_blocks == 10
    for sequence in (first, second):
        blocks.share(sequence)
    assert blocks.num_used_blocks == 6
    assert first.block_table[:4] == second.block_table[:4]
    blocks.check_integrity([first, second])


def test_unused_prefixes_are_evicted_least_recently_used_first_and_from_their_ends() -> None:
    blocks = BlockManager(10, 4)
    old, new = TOKENS, tuple(range(100, 120))
    for tokens in (old, new):
        blocks.free(cached_sequence(blocks, tokens))
    assert hit_len(blocks, old) == 16
    grabber = new_sequence()
    blocks.extend(grabber, 16)
    assert (hit_len(blocks, new), hit_len(blocks, old)) == (8, 16)


def test_cached_blocks_count_as_free() -> None:
    blocks = BlockManager(5, 4)
    blocks.free(cached_sequence(blocks, TOKENS))
    assert (blocks.num_free_blocks, blocks.num_used_blocks) == (5, 0)
    blocks.extend(new_sequence(), 20)
    assert blocks.num_free_blocks == 0


def test_a_cached_prefix_that_nobody_uses_takes_up_the_room_that_it_is_counted_in() -> None:
    blocks = BlockManager(5, 4)
    blocks.free(cached_sequence(blocks, TOKENS[:9]))
    blocks.extend(new_sequence(), 12)
    back = Sequence.from_open(open_item(prefix=TOKENS[:12]))
    assert blocks.num_free_blocks == 2
    assert not blocks.can_extend(back, 12)
    assert blocks.can_extend(back, 8)
    blocks.attach_prefix(back)
    assert (back.num_cached, blocks.num_free_blocks) == (8, 0)


def test_drafted_tokens_are_never_shared_and_committed_ones_never_cut() -> None:
    blocks = BlockManager(16, 4)
    sequence = Sequence.from_open(open_item(prefix=TOKENS[:9]))
    sequence.tokens += [50] * 6
    blocks.extend(sequence, 15)
    sequence.num_cached = 15
    blocks.share(sequence)
    assert sequence.num_shared_blocks == 2
    blocks.truncate(sequence, 8)
    with pytest.raises(IntegrityError):
        blocks.truncate(sequence, 7)
    assert sequence.num_cached == 8
    blocks.check_integrity([sequence])


def test_forgotten_prefixes_are_not_found() -> None:
    blocks = BlockManager(16, 4)
    blocks.free(cached_sequence(blocks, TOKENS))
    blocks.forget_cached()
    assert hit_len(blocks, TOKENS) == 0
    blocks.check_integrity([])


def test_statistics_count_tokens_asked_and_found() -> None:
    blocks = BlockManager(16, 4)
    blocks.free(cached_sequence(blocks, TOKENS))
    assert hit_len(blocks, (*TOKENS, 1, 2)) == 16
    assert blocks.prefix_cache_stats == (42, 16)


def test_each_block_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_hashed = 0

    def counting(data: bytes) -> object:
        nonlocal num_hashed
        num_hashed += 1
        return sha256(data)

    monkeypatch.setattr("services.engine.prefix_cache.sha256", counting)
    blocks = BlockManager(16, 4)
    sequence = cached_sequence(blocks, TOKENS)
    for _ in range(3):
        blocks.free(sequence)
        blocks.attach_prefix(sequence)
        blocks.extend(sequence, 20)
        blocks.share(sequence)
    assert num_hashed == 1 + 4


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


def test_integrity_check_finds_a_shared_block_of_other_tokens() -> None:
    blocks = BlockManager(16, 4)
    sequence = cached_sequence(blocks, TOKENS)
    sequence.block_table[0], sequence.block_table[1] = sequence.block_table[1], sequence.block_table[0]
    with pytest.raises(IntegrityError):
        blocks.check_integrity([sequence])


def test_integrity_check_finds_shared_blocks_that_are_not_committed() -> None:
    blocks = BlockManager(16, 4)
    sequence = cached_sequence(blocks, TOKENS)
    sequence.num_committed = 16
    with pytest.raises(IntegrityError):
        blocks.check_integrity([sequence])
