"""The paged KV pool's accounts: which block belongs to which sequences, and which are kept for their content.

Owns: reference counts, the free list, and the block tables of the sequences. Must not know: torch, what a block holds.
Used by the engine thread alone. Paging after Kwon et al. 2023 (PagedAttention), section 4; prefix sharing by hashed
blocks as in its section 4.4 and in vLLM's automatic prefix caching.

A block is in one of three states:

    free        no table holds it, its content is of no use
    own         one table holds it, and that sequence alone writes to it
    cached      its content is in the prefix index, any number of tables hold it, nobody ever writes to it again;
                held by none, it is evicted when the free blocks are used up, least recently used first

    block table   [ cached ... cached )[ own ... own )
    tokens        0 .. num_shared_blocks * block_size <= num_committed - 1

Only full blocks in front of the last committed token become cached, and a rejection never cuts what is committed, so
truncation and sharing cannot meet; `truncate` refuses if they do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from services.common.errors import ResourceExhausted
from services.engine.prefix_cache import PrefixCache
from services.engine.sequence import Sequence

RETRY_AFTER_MS = 200
"""What a full pool asks its callers to wait: a few steps, in which some sequence usually ends."""


class IntegrityError(AssertionError):
    """The pool's accounts contradict the block tables: a defect of the program."""


class PrefixCacheStats(NamedTuple):
    """Since the start. A preempted sequence counts each time it comes back."""

    num_tokens: int
    """Committed tokens of sequences that took their first blocks."""
    num_hit_tokens: int
    """Of these, tokens whose blocks were found in the prefix index."""


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens each; block ids are 0 .. num_blocks - 1.

    `cache_key` tells apart what depends on more than tokens (services.engine.prefix_cache.model_key).
    """

    def __init__(self, num_blocks: int, block_size: int, cache_key: bytes = b"") -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: num_blocks={num_blocks}, block_size={block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cache = PrefixCache(block_size, cache_key)
        self._stats = PrefixCacheStats(0, 0)

    @property
    def num_free_blocks(self) -> int:
        """Blocks to be had without preempting anybody: free ones and cached ones that no table holds."""
        return len(self._free) + self._cache.num_unused_blocks

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    @property
    def prefix_cache_stats(self) -> PrefixCacheStats:
        return self._stats

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that a table needs to cover `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_freed_by(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that no table would hold any more if all of `sequences` were freed."""
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        return sum(num_tables == self._num_references[block] for block, num_tables in held.items())

    def can_extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `extend` would succeed now; for a sequence without blocks, `attach_prefix` and then `extend`."""
        num_held = len(sequence.block_table) or self._num_attachable_used_blocks(sequence)
        num_missing = self.num_blocks_for(num_tokens) - num_held
        return num_missing <= 0 or num_missing <= self.num_free_blocks

    def attach_prefix(self, sequence: Sequence) -> None:
        """Gives a sequence without blocks those of its longest cached prefix, by reference, and sets num_cached.

        At least two committed tokens stay uncached: the last one's row is always computed, and there is one more to
        cache even where nobody waits for that row. So whatever a sequence wants, there is something to compute.
        """
        if sequence.block_table:
            raise ValueError("only a sequence without blocks can take a cached prefix")
        for index in range(self._max_attachable_blocks(sequence)):
            block = self._cache.find(self._cache.hash_of(sequence, index))
            if block is None:
                break
            self._reference(block)
            sequence.block_table.append(block)
        sequence.num_shared_blocks = len(sequence.block_table)
        sequence.num_cached = sequence.num_shared_blocks * self.block_size
        num_tokens, num_hit_tokens = self._stats
        self._stats = PrefixCacheStats(num_tokens + sequence.num_committed, num_hit_tokens + sequence.num_cached)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes the sequence's table cover its first `num_tokens` tokens; a table that does already stays as it is.

        Raises ResourceExhausted (KV_POOL_FULL, retriable) where blocks are lacking, and then changes nothing.
        """
        num_missing = self.num_blocks_for(num_tokens) - len(sequence.block_table)
        if num_missing > 0 and num_missing > self.num_free_blocks:
            raise ResourceExhausted(
                "KV_POOL_FULL",
                f"the KV pool has {self.num_free_blocks} free blocks of {self.num_blocks}; {num_missing} are needed",
                retry_after_ms=RETRY_AFTER_MS,
            )
        for _ in range(num_missing):
            block = self._free.pop() if self._free else self._cache.evict()
            self._num_references[block] = 1
            sequence.block_table.append(block)

    def share(self, sequence: Sequence) -> None:
        """Puts the full blocks in front of the last committed token into the prefix index, as far as they are cached.

        Where the index has a block of that content already, the sequence goes on with that one and gives its own back.
        """
        num_full = min(sequence.num_cached, sequence.num_committed - 1) // self.block_size
        for index in range(sequence.num_shared_blocks, num_full):
            block_hash, own = self._cache.hash_of(sequence, index), sequence.block_table[index]
            cached = self._cache.find(block_hash)
            if cached is None:
                self._cache.add(block_hash, own)
            else:
                self._reference(cached)
                sequence.block_table[index] = cached
                self._release(own)
            sequence.num_shared_blocks = index + 1

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Forgets what is cached at index `num_tokens` and behind, and gives back the blocks that hold nothing else.

        Raises IntegrityError where that would cut shared blocks: those hold committed tokens only.
        """
        if num_tokens < sequence.num_shared_blocks * self.block_size:
            raise IntegrityError(f"{sequence.num_shared_blocks} shared blocks cannot be cut to {num_tokens} tokens")
        sequence.num_cached = min(sequence.num_cached, num_tokens)
        self._release_behind(sequence, self.num_blocks_for(num_tokens))

    def free(self, sequence: Sequence) -> None:
        """Takes everything from the sequence. What it shared stays in the index, for it as for others to find."""
        sequence.num_cached = sequence.num_shared_blocks = 0
        self._release_behind(sequence, 0)

    def forget_cached(self) -> None:
        """Evicts every cached block that no table holds."""
        while self._cache.num_unused_blocks:
            self._free.append(self._cache.evict())

    def _max_attachable_blocks(self, sequence: Sequence) -> int:
        return max(0, sequence.num_committed - 2) // self.block_size

    def _num_attachable_used_blocks(self, sequence: Sequence) -> int:
        """Blocks that attaching would take without lessening the free ones. They come first in a cached prefix."""
        for index in range(self._max_attachable_blocks(sequence)):
            block = self._cache.find(self._cache.hash_of(sequence, index))
            if block is None or not self._num_references[block]:
                return index
        return self._max_attachable_blocks(sequence)

    def _reference(self, block: int) -> None:
        """One table more holds a cached block."""
        if not self._num_references[block]:
            self._cache.use(block)
        self._num_references[block] += 1

    def _release_behind(self, sequence: Sequence, num_kept: int) -> None:
        """Last block first: the end of a prefix is of use to fewer than its beginning, and evicted before it."""
        while len(sequence.block_table) > num_kept:
            self._release(sequence.block_table.pop())

    def _release(self, block: int) -> None:
        self._num_references[block] -= 1
        if self._num_references[block]:
            return
        if block in self._cache:
            self._cache.let_go(block)
        else:
            self._free.append(block)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raises IntegrityError unless `sequences`, all that hold blocks, agree with the pool's accounts."""
        held: Counter[int] = Counter()
        for sequence in sequences:
            self._check_table(sequence)
            held.update(sequence.block_table)
        free, unused = Counter(self._free), set(self._cache.unused)
        for block in range(self.num_blocks):
            is_cached = block in self._cache
            if held[block] != self._num_references[block]:
                raise IntegrityError(
                    f"block {block} has {self._num_references[block]} references, {held[block]} tables hold it"
                )
            if held[block] > 1 and not is_cached:
                raise IntegrityError(f"block {block} is in {held[block]} tables, but not in the prefix index")
            if free[block] != (not held[block] and not is_cached):
                raise IntegrityError(f"block {block}: {held[block]} tables hold it, it is free {free[block]} times")
            if (block in unused) != (not held[block] and is_cached):
                raise IntegrityError(f"block {block}: {held[block]} tables hold it, unused is {block in unused}")

    def _check_table(self, sequence: Sequence) -> None:
        table, num_shared = sequence.block_table, sequence.num_shared_blocks
        if len(set(table)) != len(table):
            raise IntegrityError(f"a table holds a block twice: {table}")
        if sequence.num_cached > len(table) * self.block_size:
            raise IntegrityError(f"{sequence.num_cached} tokens are cached in {len(table)} blocks")
        if num_shared and num_shared * self.block_size > min(sequence.num_cached, sequence.num_committed - 1):
            raise IntegrityError(f"{num_shared} blocks are shared, but {sequence.num_committed} tokens are committed")
        for index, block in enumerate(table):
            if (block in self._cache) != (index < num_shared):
                raise IntegrityError(f"block {block} at {index}: {num_shared} blocks are shared")
            if index < num_shared and self._cache.find(self._cache.hash_of(sequence, index)) != block:
                raise IntegrityError(f"block {block} at {index} is not the one that the index has for its tokens")
