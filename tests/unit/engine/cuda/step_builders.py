"""Sequences and works of given lengths in scattered blocks, for tests of steps in tiles."""

from __future__ import annotations

import random

from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.sequence import Sequence
from services.engine.step import Work


def sequence(tokens: list[int], num_cached: int, block_table: list[int]) -> Sequence:
    identity = Identity("s", 0, 0, 0, len(tokens))
    opened = Sequence.from_open(
        Open(identity, tuple(tokens), 1, frozenset(), SamplingParams(), VerificationMethod.COUPLED, 10)
    )
    opened.num_cached = num_cached
    opened.block_table = block_table
    return opened


def works(lengths: list[tuple[int, int]], block_size: int, num_blocks: int, seed: int = 0) -> list[Work]:
    """One work for each (cached tokens, computed tokens), of which all but one are drafted; tables are shuffled."""
    rng = random.Random(seed)
    free = rng.sample(range(num_blocks), num_blocks)
    made = []
    for cached, computed in lengths:
        table = [free.pop() for _ in range(-(-(cached + computed) // block_size))]
        tokens = [rng.randrange(1, 60) for _ in range(cached + computed)]
        proposal = Proposal(0, tuple(tokens[cached + 1 :])) if computed > 1 else None
        made.append(Work(sequence(tokens[: cached + 1], cached, table), 1, proposal, computed))
    return made
