"""TileKernels in plain torch, tile by tile: the reference for the kernels, and their stand-in where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.cuda.tile_step import AttendArguments


class PlainKernels:
    """Float32 inside. Every token must be in exactly one tile: what no tile covers comes out as NaN."""

    def write(self, keys: Tensor, values: Tensor, slots: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        keys.flatten(0, 1)[slots] = new_keys
        values.flatten(0, 1)[slots] = new_values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, arguments: AttendArguments) -> Tensor:
        num_tokens, num_heads, _ = query.shape
        output = query.new_full((num_tokens, num_heads, values.shape[3]), torch.nan)
        for tiles in arguments.tiles:
            for start, first, num_rows, position in tiles.tolist():
                if num_rows:
                    rows = slice(first, first + num_rows)
                    table = arguments.tables[start : start + -(-(position + num_rows) // keys.shape[1])]
                    output[rows] = _attend(query[rows], keys[table], values[table], position, arguments)
        return output


def _attend(query: Tensor, keys: Tensor, values: Tensor, position: int, arguments: AttendArguments) -> Tensor:
    fold = query.shape[1] // keys.shape[2]
    k = keys.flatten(0, 1).float().repeat_interleave(fold, dim=1)
    v = values.flatten(0, 1).float().repeat_interleave(fold, dim=1)
    scale = query.shape[2] ** -0.5 if arguments.scaling is None else arguments.scaling
    scores = torch.einsum("rhd,nhd->hrn", query.float(), k) * scale
    if arguments.softcap is not None:
        scores = arguments.softcap * torch.tanh(scores / arguments.softcap)
    other = torch.arange(len(k), device=query.device)[None]
    own = torch.arange(len(query), device=query.device)[:, None] + position
    visible = other <= own
    if arguments.window is not None:
        visible &= other > own - arguments.window
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=2)
    return torch.einsum("hrn,nhd->rhd", weights, v).to(query.dtype)
