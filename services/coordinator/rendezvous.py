"""Which worker a prefix belongs to: bounded-load rendezvous hashing.

Owns: the choice among candidates. Must not know: links, models, sessions. Pure functions.

Every worker has a score for each prefix (Thaler & Ravishankar 1998, "Using name-based mappings to increase hit rates"):
equal prefixes meet on one worker, and a worker that leaves or joins moves its own share only. The best one takes it
unless it is at its bound, ceil(c (m + 1) / n) of the m sequences on n workers; then the next best (Mirrokni, Thorup &
Zadimoghaddam 2018, "Consistent hashing with bounded loads"). As c > 1, one is always below the bound.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

NUM_PREFIX_TOKENS = 256
LOAD_FACTOR = 1.25


class Candidate(NamedTuple):
    """A worker that would take the sequence."""

    name: str
    num_sequences: int
    max_sequences: int


def prefix_key(token_ids: Sequence[int]) -> bytes:
    """What tells prefixes apart: a digest of the first tokens."""
    prefix = token_ids[:NUM_PREFIX_TOKENS]
    return hashlib.sha256(struct.pack(f"<{len(prefix)}I", *prefix)).digest()


def bounded_choice(key: bytes, candidates: Sequence[Candidate], load_factor: float = LOAD_FACTOR) -> Candidate | None:
    """The candidate for a prefix, whatever their order; full ones only where all are. None without candidates."""
    open_ones = [candidate for candidate in candidates if candidate.num_sequences < candidate.max_sequences]
    open_ones = open_ones or list(candidates)
    if not open_ones:
        return None
    num_sequences = sum(candidate.num_sequences for candidate in open_ones)
    bound = math.ceil(load_factor * (num_sequences + 1) / len(open_ones))
    below = [candidate for candidate in open_ones if candidate.num_sequences < bound]
    return max(below, key=lambda candidate: (_score(key, candidate.name), candidate.name))


def _score(key: bytes, name: str) -> bytes:
    return hashlib.sha256(key + name.encode()).digest()
