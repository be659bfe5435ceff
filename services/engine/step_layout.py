"""Lays the works of a step end to end and computes, once a step, every index its layers share.

Owns: where each token of a step comes from and goes to. Must not know: models, attention, the pool's contents.

Works are split into at most MAX_GROUPS groups of like rows and contexts, so that the padding of a group to its longest
members stays small: one row beside a chunk of prefill, or a short context beside a long one, would cost as much:

    tokens of the step      [ w0 | w1     | w2 | ...        ]    laid end to end, as the model sees them
    query rows of a group   [ w0 . . | w2 . . | ...         ]    (batch, max_rows), padding rows repeat the first token
    blocks of a group       [ b b c c | b b b b | ...       ]    (batch, max_blocks), padding repeats the last, masked

Masking hides numbers only: NaN from a padding block would show. So it is one of the sequence's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.engine.step import Work

MAX_GROUPS = 3
MIN_SAVING = 0.25
"""Part of the padded work that one more group must save: each costs every layer a few calls."""
GATHER_ROWS = 8
"""Gathering a block costs about as much as so many rows that look at it."""

Ints = npt.NDArray[np.int64]
ToDevice = Callable[[Ints], torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences that attend together. `batch` sequences, `max_rows` query rows each."""

    batch: int
    max_rows: int
    rows: torch.Tensor | slice
    """(batch * max_rows,): index of each query row among the step's tokens, or where they follow each other there."""
    row_positions: torch.Tensor
    """(batch, max_rows): absolute position of each query row; padding is at 0, where something is always visible."""
    blocks: torch.Tensor
    """(batch, max_blocks): the block tables, padded with the last block of each."""
    first_block: int | None = None
    """Of a single sequence whose blocks follow each other in the pool, the first: nothing needs to be gathered."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Index tensors of one step, all int64 on the model's device."""

    token_ids: torch.Tensor
    """(tokens,)"""
    positions: torch.Tensor
    """(tokens,)"""
    slots: torch.Tensor
    """(tokens,): where each token's keys and values are written."""
    logit_rows: torch.Tensor
    """(sum of num_rows,): index among the step's tokens of every row whose logits are wanted."""
    groups: tuple[AttentionGroup, ...]
    output_rows: torch.Tensor | None
    """(tokens,): index of each token in the groups' outputs laid end to end; None: they are in order already."""


def build_layout(works: list[Work], block_size: int, device: torch.device, *, grouped: bool = True) -> StepLayout:
    """Computes the layout of a step of at least one work; without groups for an attention that needs none."""

    def to_device(values: Ints) -> torch.Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    lens = np.array([work.num_computed_tokens for work in works], dtype=np.int64)
    starts = np.cumsum(lens) - lens
    token_ids: list[int] = []
    for work in works:
        first = work.sequence.num_cached
        token_ids += work.sequence.tokens[first : first + work.num_new_tokens]
        token_ids += work.drafted
    positions = [np.arange(w.sequence.num_cached, w.sequence.num_cached + n) for w, n in zip(works, lens, strict=True)]
    slots = [_slots(w, p, block_size) for w, p in zip(works, positions, strict=True)]
    ends = starts + lens
    logit_rows = [np.arange(end - work.num_rows, end) for work, end in zip(works, ends, strict=True)]
    groups, output_rows = _build_groups(works, lens, starts, block_size, to_device) if grouped else ((), None)
    return StepLayout(
        token_ids=to_device(np.array(token_ids, dtype=np.int64)),
        positions=to_device(np.concatenate(positions)),
        slots=to_device(np.concatenate(slots)),
        logit_rows=to_device(np.concatenate(logit_rows)),
        groups=groups,
        output_rows=output_rows,
    )


def _slots(work: Work, positions: Ints, block_size: int) -> Ints:
    first = int(positions[0]) // block_size
    blocks = np.array(work.sequence.block_table[first : int(positions[-1]) // block_size + 1], dtype=np.int64)
    slots: Ints = blocks[positions // block_size - first] * block_size + positions % block_size
    return slots


def _build_groups(
    works: list[Work], lens: Ints, starts: Ints, block_size: int, to_device: ToDevice
) -> tuple[tuple[AttentionGroup, ...], torch.Tensor | None]:
    ends = np.array([work.sequence.num_cached for work in works], dtype=np.int64) + lens
    members = partition(lens, -(-ends // block_size))
    groups, output_rows, offset = [], np.zeros(int(lens.sum()), dtype=np.int64), 0
    for member in members:
        max_rows = int(lens[member].max())
        within = np.arange(max_rows)
        real = within < lens[member, None]
        rows = np.where(real, starts[member, None] + within, starts[member, None])
        cached = np.array([works[i].sequence.num_cached for i in member])
        output_rows[rows[real]] = offset + np.flatnonzero(real)
        first = int(rows[0, 0])
        is_slice = bool((rows.ravel() == np.arange(first, first + rows.size)).all())
        blocks = _padded_blocks([works[i] for i in member], block_size)
        is_run = len(member) == 1 and bool((np.diff(blocks[0]) == 1).all())
        groups.append(
            AttentionGroup(
                batch=len(member),
                max_rows=max_rows,
                rows=slice(first, first + rows.size) if is_slice else to_device(rows.ravel()),
                row_positions=to_device(np.where(real, cached[:, None] + within, 0)),
                blocks=to_device(blocks),
                first_block=int(blocks[0, 0]) if is_run else None,
            )
        )
        offset += rows.size
    is_in_order = offset == len(output_rows) and bool((output_rows == np.arange(offset)).all())
    return tuple(groups), None if is_in_order else to_device(output_rows)


def partition(rows: Ints, blocks: Ints) -> list[Ints]:
    """Splits works with so many rows and blocks each into groups; their indices, ascending within a group."""
    groups = [np.argsort(rows * blocks, kind="stable")]
    while len(groups) < MAX_GROUPS:
        total = sum(_padded_work(rows[group], blocks[group])[-1] for group in groups)
        saving, index, at = max(_best_split(rows[group], blocks[group], n) for n, group in enumerate(groups))
        if saving <= MIN_SAVING * total:
            break
        groups[index : index + 1] = groups[index][:at], groups[index][at:]
    return sorted((np.sort(group) for group in groups), key=lambda group: int(group[0]))


def _best_split(rows: Ints, blocks: Ints, index: int) -> tuple[float, int, int]:
    """What splitting a group saves at most, the group's index, and the place to split at."""
    whole = _padded_work(rows, blocks)
    if len(rows) == 1:
        return 0.0, index, 0
    rest = _padded_work(rows[::-1], blocks[::-1])[::-1]
    savings = whole[-1] - (whole[:-1] + rest[1:])
    at = int(savings.argmax())
    return float(savings[at]), index, at + 1


def _padded_work(rows: Ints, blocks: Ints) -> Ints:
    """Of the first 1, 2, ... works as one group."""
    max_blocks, max_rows = np.maximum.accumulate(blocks), np.maximum.accumulate(rows)
    work: Ints = np.arange(1, len(rows) + 1) * max_blocks * (max_rows + GATHER_ROWS)
    return work


def _padded_blocks(works: list[Work], block_size: int) -> Ints:
    counts = [-(-(work.sequence.num_cached + work.num_computed_tokens) // block_size) for work in works]
    blocks: Ints = np.empty((len(works), max(counts)), dtype=np.int64)
    for row, work, count in zip(blocks, works, counts, strict=True):
        row[:count] = work.sequence.block_table[:count]
        row[count:] = row[count - 1]
    return blocks
