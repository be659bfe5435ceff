"""Lays a step out for the kernels: every index of the step in one array of integers, so that one copy moves it.

Owns: tiles, padding, and where each part stands in that array. Must not know: models, kernels, graphs.

    the array    token ids | positions | slots | logit rows | tiles of each group | block tables, end to end
                 tokens      tokens      tokens  logits       4 a tile              as many as the step's sequences have

A tile is at most `tile_rows` consecutive rows of one sequence: (start of its block table, its first row among the
step's tokens, number of rows, position of the first). Sequences are grouped by the lowest of TILE_ROWS that holds their
rows, so that decoding beside a prefill chunk is not computed in that chunk's tiles.

Padding makes a step's shape one of few (see `padded`): a padding token is token 0 at position 0 of a sequence of its
own in the spare block, and a padding tile has no rows. Nothing of them reaches a real row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from services.engine.step import Work

Ints = npt.NDArray[np.int64]

TILE_ROWS = (2, 8, 32)
"""A draft's catching up after a full acceptance; the default proposals; the longest ones, and prefill chunks."""


class TileGroup(NamedTuple):
    """Tiles that one launch computes."""

    num_tiles: int
    tile_rows: int


class StepShape(NamedTuple):
    """Everything about a step that a graph of it fixes."""

    num_tokens: int
    num_logits: int
    groups: tuple[TileGroup, ...]

    @property
    def tables_start(self) -> int:
        """Where the block tables begin in the array."""
        return 3 * self.num_tokens + self.num_logits + 4 * sum(group.num_tiles for group in self.groups)


@dataclass(frozen=True, slots=True)
class StepTensors:
    """The parts of the array on the device, as views, all int64."""

    token_ids: torch.Tensor
    """(tokens,)"""
    positions: torch.Tensor
    """(tokens,)"""
    slots: torch.Tensor
    """(tokens,): where each token's keys and values are written."""
    logit_rows: torch.Tensor
    """(logits,): index among the tokens of every row whose logits are wanted."""
    tiles: tuple[torch.Tensor, ...]
    """One (tiles, 4) a group."""
    tables: torch.Tensor

    @classmethod
    def view(cls, array: torch.Tensor, shape: StepShape) -> StepTensors:
        """Views into `array` (at least shape.tables_start + 1,)."""
        tokens, tables = shape.num_tokens, shape.tables_start
        sizes = [tokens, tokens, tokens, shape.num_logits, *(4 * group.num_tiles for group in shape.groups)]
        token_ids, positions, slots, logit_rows, *tiles = torch.split(array[:tables], sizes)
        shaped = tuple(part.view(-1, 4) for part in tiles)
        return cls(token_ids, positions, slots, logit_rows, shaped, array[tables:])


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A step's indices on the host, unpadded."""

    token_ids: Ints
    positions: Ints
    slots: Ints
    logit_rows: Ints
    tiles: tuple[Ints, ...]
    """One (tiles, 4) a group."""
    tables: Ints
    shape: StepShape

    @classmethod
    def of(cls, works: list[Work], block_size: int, grouped: bool = True) -> StepPlan:
        """The plan of at least one work. Not `grouped`: one group, of the tiles that the longest work needs."""
        lens = np.array([work.num_computed_tokens for work in works], dtype=np.int64)
        cached = np.array([work.sequence.num_cached for work in works], dtype=np.int64)
        starts = np.cumsum(lens) - lens
        work_of, within = _ranges(lens)
        positions = cached[work_of] + within

        num_blocks = -(-(cached + lens) // block_size)
        used = [work.sequence.block_table[:n] for work, n in zip(works, num_blocks.tolist(), strict=True)]
        tables = np.fromiter(chain.from_iterable(used), dtype=np.int64, count=int(num_blocks.sum()))
        table_starts = np.cumsum(num_blocks) - num_blocks
        blocks = tables[table_starts[work_of] + positions // block_size]

        num_rows = np.array([work.num_rows for work in works], dtype=np.int64)
        row_work, row = _ranges(num_rows)
        logit_rows = (starts + lens - num_rows)[row_work] + row

        heights = np.array(TILE_ROWS)[np.minimum(np.searchsorted(TILE_ROWS, lens), len(TILE_ROWS) - 1)]
        if not grouped:
            heights[:] = heights.max()
        groups, tiles = [], []
        for tile_rows in np.unique(heights).tolist():
            members = np.flatnonzero(heights == tile_rows)
            tiles.append(_tiles(members, tile_rows, lens, table_starts, starts, cached))
            groups.append(TileGroup(len(tiles[-1]), tile_rows))
        return cls(
            token_ids=np.fromiter(chain.from_iterable(map(_token_ids, works)), dtype=np.int64, count=len(positions)),
            positions=positions,
            slots=blocks * block_size + positions % block_size,
            logit_rows=logit_rows,
            tiles=tuple(tiles),
            tables=tables,
            shape=StepShape(len(positions), len(logit_rows), tuple(groups)),
        )

    @classmethod
    def empty(cls) -> StepPlan:
        """The plan of no work: padded, a step that touches the spare block alone."""
        none = np.zeros(0, dtype=np.int64)
        shape = StepShape(0, 0, (TileGroup(0, TILE_ROWS[0]),))
        return cls(none, none, none, none, (np.zeros((0, 4), dtype=np.int64),), none, shape)

    def pack(self) -> Ints:
        """The array, unpadded. It ends with one entry more than its tables, so that they are never empty."""
        tiles = [part.ravel() for part in self.tiles]
        spare = np.zeros(1, dtype=np.int64)
        return np.concatenate([self.token_ids, self.positions, self.slots, self.logit_rows, *tiles, self.tables, spare])

    def padded(self, shape: StepShape, spare_slot: int, spare_block: int) -> StepPlan:
        """This plan of one group in a larger shape of one group with room for a tile a token."""
        num_tokens = self.shape.num_tokens
        missing = shape.num_tokens - num_tokens
        tiles = np.zeros((shape.groups[0].num_tiles, 4), dtype=np.int64)
        num_tiles = len(self.tiles[0])
        tiles[:num_tiles] = self.tiles[0]
        rows = np.arange(num_tokens, shape.num_tokens)
        tiles[num_tiles : num_tiles + missing, 0] = len(self.tables)
        tiles[num_tiles : num_tiles + missing, 1] = rows
        tiles[num_tiles : num_tiles + missing, 2] = 1
        return StepPlan(
            token_ids=_extend(self.token_ids, missing, 0),
            positions=_extend(self.positions, missing, 0),
            slots=_extend(self.slots, missing, spare_slot),
            logit_rows=_extend(self.logit_rows, shape.num_logits - self.shape.num_logits, 0),
            tiles=(tiles,),
            tables=np.append(self.tables, spare_block),
            shape=shape,
        )


def _ranges(lens: Ints) -> tuple[Ints, Ints]:
    """For lens (2, 3): whose each item is, (0, 0, 1, 1, 1), and its place there, (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(lens)), lens)
    return owner, np.arange(len(owner)) - (np.cumsum(lens) - lens)[owner]


def _tiles(members: Ints, tile_rows: int, lens: Ints, table_starts: Ints, starts: Ints, cached: Ints) -> Ints:
    counts = -(-lens[members] // tile_rows)
    owner, within = _ranges(counts)
    work, offset = members[owner], within * tile_rows
    rows = np.minimum(tile_rows, lens[work] - offset)
    return np.stack([table_starts[work], starts[work] + offset, rows, cached[work] + offset], axis=1)


def _token_ids(work: Work) -> list[int]:
    first = work.sequence.num_cached
    return [*work.sequence.tokens[first : first + work.num_new_tokens], *work.drafted]


def _extend(values: Ints, missing: int, padding: int) -> Ints:
    return np.concatenate([values, np.full(missing, padding, dtype=np.int64)])
