"""Finds prefill chunks that left something else than numbers in the KV pool: no logits tell of them.

Owns: that check and its sentence. Must not know: what becomes of such a sequence, models.
"""

from __future__ import annotations

from itertools import chain

from services.common.errors import Internal
from services.engine.kv_pool import KvPool
from services.engine.step import Work


def chunk_errors(works: list[Work], pool: KvPool) -> dict[int, Internal]:
    """By index, an error for each work without rows whose keys or values are not finite, once they are written.

    Only the last layer is looked at: a token sees itself, so what is not finite in one layer is not in the next. On
    CUDA nobody is found: kernels there read no masked slot, and the look would wait for the device.
    """
    blocks = {index: _written(work, pool.block_size) for index, work in enumerate(works) if not work.num_rows}
    if not pool.layer(-1)[0].is_cpu or not blocks or pool.is_finite(chain(*blocks.values()), first_layer=-1):
        return {}
    return {i: _error(works[i]) for i, written in blocks.items() if not pool.is_finite(written, first_layer=-1)}


def _written(work: Work, block_size: int) -> list[int]:
    start = work.sequence.num_cached
    return work.sequence.block_table[start // block_size : -(-(start + work.num_computed_tokens) // block_size)]


def _error(work: Work) -> Internal:
    sequence = work.sequence
    where = f"session {sequence.identity.session_id}, behind {sequence.num_cached} tokens"
    return Internal("DEFECT", f"the model's keys and values are not finite: {where}")
