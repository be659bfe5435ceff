"""The paged KV pool's accounts: which block belongs to which sequence.

Owns: reference counts, the free list, and the block tables of the sequences. Must not know: torch, a block's contents.
Invariant (`check_integrity`): a block is free exactly where no table holds it, and its reference count is the number of
tables that do. Used by the engine thread alone. Paging after Kwon et al. 2023 (PagedAttention), section 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from services.common.errors import ResourceExhausted
from services.engine.sequence import Sequence

RETRY_AFTER_MS = 200
"""What a full pool asks its callers to wait: a few steps, in which some sequence usually ends."""


class IntegrityError(AssertionError):
    """The pool's accounts contradict the block tables: a defect of the program."""


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens each; block ids are 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: num_blocks={num_blocks}, block_size={block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that a table needs to cover `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `extend` would succeed now."""
        return self.num_blocks_for(num_tokens) - len(sequence.block_table) <= len(self._free)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes the sequence's table cover its first `num_tokens` tokens; a table that does already stays as it is.

        Raises ResourceExhausted (KV_POOL_FULL, retriable) where blocks are lacking, and then changes nothing.
        """
        num_missing = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        if num_missing > len(self._free):
            raise ResourceExhausted(
                "KV_POOL_FULL",
                f"the KV pool has {len(self._free)} free blocks of {self.num_blocks}; {num_missing} are needed",
                retry_after_ms=RETRY_AFTER_MS,
            )
        for _ in range(num_missing):
            block = self._free.pop()
            self._num_references[block] = 1
            sequence.block_table.append(block)

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Forgets what is cached at index `num_tokens` and behind, and gives back the blocks that hold nothing else."""
        sequence.num_cached = min(sequence.num_cached, num_tokens)
        num_kept = self.num_blocks_for(num_tokens)
        while len(sequence.block_table) > num_kept:
            block = sequence.block_table.pop()
            self._num_references[block] -= 1
            if not self._num_references[block]:
                self._free.append(block)

    def free(self, sequence: Sequence) -> None:
        """Gives back everything that the sequence holds; nothing of it is cached afterwards."""
        self.truncate(sequence, 0)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises IntegrityError unless `sequences`, all that hold blocks, agree with the pool's accounts."""
        held: Counter[int] = Counter()
        for sequence in sequences:
            table = sequence.block_table
            if len(set(table)) != len(table):
                raise IntegrityError(f"a table holds a block twice: {table}")
            if sequence.num_cached > len(table) * self.block_size:
                raise IntegrityError(f"{sequence.num_cached} tokens are cached in {len(table)} blocks")
            held.update(table)
        free = Counter(self._free)
        for block in range(self.num_blocks):
            if held[block] != self._num_references[block]:
                raise IntegrityError(
                    f"block {block} has {self._num_references[block]} references, {held[block]} tables hold it"
                )
            if free[block] != (not held[block]):
                raise IntegrityError(f"block {block}: {held[block]} tables hold it, it is free {free[block]} times")
