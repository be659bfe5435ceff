"""The message that rank 0 sends for each step: what a runner must know of its works, as an array of integers.

Owns: the order of the numbers. Must not know: how they travel, how a runner lays works out, sampling.

    works, then for each    num_cached | new tokens | drafted tokens | num_rows | blocks
    then for each           its tokens to compute, new and drafted | its block table

Of a sequence's cached tokens only the number is sent: a runner reads no others than those it computes. A step without
works has the pool zeroed.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import numpy.typing as npt

from services.common.items import Identity
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine.sequence import Sequence
from services.engine.step import Work

Ints = npt.NDArray[np.int64]

_NUM_FIELDS = 5
_NOBODY = Identity(session_id="", lease_epoch=0, attempt=0, round=0, base_len=0)


def pack(works: list[Work]) -> Ints:
    """The message of a step."""
    fields = [
        (w.sequence.num_cached, w.num_new_tokens, len(w.drafted), w.num_rows, len(w.sequence.block_table))
        for w in works
    ]
    parts = chain.from_iterable((_new_tokens(work), work.drafted, work.sequence.block_table) for work in works)
    return np.array([len(works), *chain.from_iterable(fields), *chain.from_iterable(parts)], dtype=np.int64)


def unpack(message: Ints) -> list[Work]:
    """The works of a message, as far as a runner reads them. Cached tokens stand as 0."""
    numbers: list[int] = message.tolist()
    offset = 1 + numbers[0] * _NUM_FIELDS
    works = []
    for start in range(1, offset, _NUM_FIELDS):
        num_cached, num_new, num_drafted, num_rows, num_blocks = numbers[start : start + _NUM_FIELDS]
        tokens, drafted, blocks = np.cumsum([num_new, num_drafted, num_blocks]).tolist()
        part = numbers[offset : offset + blocks]
        offset += blocks
        sequence = _sequence([0] * num_cached + part[:tokens], num_cached, part[drafted:])
        proposal = Proposal(0, tuple(part[tokens:drafted])) if num_drafted else None
        works.append(Work(sequence, num_new, proposal, num_rows))
    return works


def _new_tokens(work: Work) -> list[int]:
    first = work.sequence.num_cached
    return work.sequence.tokens[first : first + work.num_new_tokens]


def _sequence(tokens: list[int], num_cached: int, block_table: list[int]) -> Sequence:
    return Sequence(
        identity=_NOBODY,
        tokens=tokens,
        prompt_len=0,
        eos_token_ids=frozenset(),
        sampling=SamplingParams(),
        verification=VerificationMethod.COUPLED,
        max_len=0,
        num_cached=num_cached,
        block_table=block_table,
    )
