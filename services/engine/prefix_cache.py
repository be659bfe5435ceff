"""The index of cached prefixes: which block holds which tokens behind which prefix, and which of them nobody uses.

Owns: the hash chain of a sequence's blocks, the index by hash, and the order of eviction. Must not know: torch,
reference counts, how a block came to be filled.

    root     SHA-256(model key, NUL, cache salt)            model key: digest and dtype
    hash[i]  SHA-256(hash[i - 1], tokens of block i)        hash[-1] = root; tokens as uint32

A hash names a block's tokens and everything in front of them, for one model and one tenant. SHA-256 is not truncated:
finding two prefixes of one hash takes about 2^128 evaluations, so tokens are not compared again.
Invariant: with a block, the index holds all blocks of the prefix in front of it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import sha256

from services.common.values import ModelInfo
from services.engine.sequence import Sequence

ROOT_SEPARATOR = b"\0"


def model_key(info: ModelInfo) -> bytes:
    """What a cached block depends on beside its tokens: the model's weights and the type it is computed in."""
    return f"{info.digest} {info.dtype}".encode()


class PrefixCache:
    """Blocks by content. `block_size` tokens each; `key`: services.engine.prefix_cache.model_key."""

    def __init__(self, block_size: int, key: bytes) -> None:
        self._block_size = block_size
        self._key = key
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Least recently used first. A prefix is let go from its end, so a block stands behind all that continue it."""

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    @property
    def num_unused_blocks(self) -> int:
        """Blocks that are held for their content alone."""
        return len(self._unused)

    @property
    def unused(self) -> list[int]:
        """Those blocks, the next to be evicted first."""
        return list(self._unused)

    def hash_of(self, sequence: Sequence, index: int) -> bytes:
        """The hash of the sequence's block `index`, whose tokens are all committed. Computed once a block."""
        hashes, size = sequence.block_hashes, self._block_size
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else sha256(self._key + ROOT_SEPARATOR + sequence.cache_salt).digest()
            first = len(hashes) * size
            tokens = array("I", sequence.tokens[first : first + size])
            hashes.append(sha256(parent + tokens.tobytes()).digest())
        return hashes[index]

    def find(self, block_hash: bytes) -> int | None:
        """The block of that content."""
        return self._block_of.get(block_hash)

    def add(self, block_hash: bytes, block: int) -> None:
        """Takes in a block that is in use, and whose content the index does not have."""
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash

    def let_go(self, block: int) -> None:
        """Nobody uses the block any more; it is the most recently used of those."""
        self._unused[block] = None

    def use(self, block: int) -> None:
        """Somebody uses the block again."""
        del self._unused[block]

    def evict(self) -> int:
        """Forgets the content of the least recently used of the unused blocks, and returns it."""
        block, _ = self._unused.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block
