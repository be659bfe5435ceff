"""The attention behind every model: writes keys and values into the paged pool and attends over block tables.

Owns: the function registered with transformers' attention interface, and its exactness: a keyword that could change the
result and is not handled here raises. Must not know: which model calls it, sequences, the scheduler.

The paging is that of Kwon et al. 2023 (PagedAttention). Query heads that share a key head (Ainslie et al. 2023) are
folded into the rows of one product instead of repeating keys and values. The number of torch calls a layer is constant:
a few groups of sequences (services.engine.step_layout), one product each.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from services.common.errors import ModelUnsupported
from services.engine.cpu import halves
from services.engine.kv_pool import KvPool, LayerShape
from services.engine.step_layout import AttentionGroup, StepLayout

IMPLEMENTATION = "outrider_paged"
"""The name under which models ask for this attention. No mask function bears it, so that models build no mask."""

_IRRELEVANT = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Keywords that attention functions get and that cannot change their result."""


class LayerCall(NamedTuple):
    """What a layer hands to its attention besides the tensors. `window`: tokens visible, the row's own included."""

    layer: int
    scaling: float | None
    window: int | None
    softcap: float | None


class Rotation(NamedTuple):
    """Turns heads (tokens, heads, dim) by their positions (Su et al. 2021, RoFormer), both halves of `dim` at once:
    cos * x + sin * (-x2, x1) for x = (x1, x2), where (-x2, x1) is x rolled by half, its first half negated."""

    cos: torch.Tensor
    """(tokens, 1, dim)"""
    signed_sin: torch.Tensor
    """As `cos`, negative in the first half."""

    @classmethod
    def of(cls, embeddings: tuple[torch.Tensor, torch.Tensor]) -> Rotation:
        cos, sin = (table[0].unsqueeze(1) for table in embeddings)
        half = sin.shape[-1] // 2
        return cls(cos, torch.cat((-sin[..., :half], sin[..., half:]), -1))

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(heads * self.cos, heads.roll(heads.shape[-1] // 2, -1), self.signed_sin)


class AttentionStep(Protocol):
    """Travels through the model's call as the keyword `paged_step` and computes its layers' attention."""

    def rotation(self, embeddings: tuple[torch.Tensor, torch.Tensor]) -> Rotation:
        """What turns the step's heads, from the model's cosines and sines."""
        return Rotation.of(embeddings)

    def attend(self, call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query (tokens, heads, dim), key and value (tokens, kv heads, dim) to (tokens, heads, value dim)."""
        ...

    def attend_heads(
        self, call: LayerCall, heads: torch.Tensor, num_heads: int, rotation: Rotation | None
    ) -> torch.Tensor:
        """As `attend`, of all heads (tokens, heads + 2 kv heads, dim) of one size; None: they are rotated already."""
        num_kv_heads = (heads.shape[1] - num_heads) // 2
        turned, value = heads.split_with_sizes((num_heads + num_kv_heads, num_kv_heads), 1)
        turned = turned if rotation is None else rotation.turn(turned)
        query, key = turned.split_with_sizes((num_heads, num_kv_heads), 1)
        return self.attend(call, query, key, value)


def register() -> None:
    """Makes IMPLEMENTATION known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    *,
    paged_step: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """The signature transformers calls: query (1, heads, tokens, dim) and so on; returns (1, tokens, heads, value dim).

    Raises ModelUnsupported for anything that asks for another attention than causal attention over the tokens so far,
    optionally in a sliding window, optionally with a soft cap.
    """
    layer = getattr(module, "layer_idx", None)
    _refuse_unknown(others)
    if paged_step is None:
        raise ModelUnsupported("the model does not hand extra keywords of its call down to its attention")
    if layer is None:
        raise ModelUnsupported("an attention layer does not know its own index")
    if attention_mask is not None:
        raise ModelUnsupported("the model builds an attention mask of its own")
    if dropout:
        raise ModelUnsupported("the model applies dropout to its attention while serving")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelUnsupported("an attention layer is not causal")
    call = LayerCall(layer, scaling, sliding_window, softcap)
    attended = paged_step.attend(call, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attended.unsqueeze(0), None


def _refuse_unknown(others: dict[str, object]) -> None:
    for name, value in others.items():
        if value is not None and name not in _IRRELEVANT:
            raise ModelUnsupported(f"the model's attention takes an argument {name!r}, which the paged attention lacks")


class PagedStep(AttentionStep):
    """The attention of one step over a pool. Masks are made once and shared by the layers of the same window."""

    def __init__(self, pool: KvPool, layout: StepLayout) -> None:
        self._pool = pool
        self._layout = layout
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._halved_masks: dict[tuple[int, int], torch.Tensor] = {}
        self._rotations: dict[int, tuple[tuple[torch.Tensor, torch.Tensor], Rotation]] = {}

    def rotation(self, embeddings: tuple[torch.Tensor, torch.Tensor]) -> Rotation:
        """Of the step's tokens, from cosines and sines (1, tokens, dim): made once for all layers that share them."""
        found = self._rotations.get(id(embeddings[0]))
        if found is None:
            found = self._rotations[id(embeddings[0])] = embeddings, Rotation.of(embeddings)
        return found[1]

    def attend(self, call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self._pool.write(call.layer, self._layout.slots, key, value)
        num_heads, num_kv_heads, value_dim = query.shape[1], key.shape[1], value.shape[2]
        outputs = [
            self._attend_group(call, i, query, num_heads // num_kv_heads) for i in range(len(self._layout.groups))
        ]
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self._layout.output_rows is not None:
            attended = attended.index_select(0, self._layout.output_rows)
        return attended.view(-1, num_heads, value_dim)

    def _attend_group(self, call: LayerCall, index: int, query: torch.Tensor, fold: int) -> torch.Tensor:
        """Query rows of one group to (batch * max_rows, heads * value dim); `fold` query heads share a key head."""
        group = self._layout.groups[index]
        batch, max_rows = group.batch, group.max_rows
        rows = query[group.rows] if isinstance(group.rows, slice) else query.index_select(0, group.rows)
        num_kv_heads, dim = query.shape[1] // fold, query.shape[2]
        if max_rows == 1:
            folded = rows.reshape(batch, num_kv_heads, fold, dim)
        else:  # (batch, rows, kv heads, fold, dim) to (batch, kv heads, fold * rows, dim)
            folded = rows.reshape(batch, max_rows, num_kv_heads, fold, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        if group.first_block is None:
            keys, values = self._pool.gather(call.layer, group.blocks)
        else:
            keys, values = self._pool.run(call.layer, group.first_block, group.blocks.shape[1])
        mask = self._mask(index, fold, call.window, query.dtype)
        if call.softcap is None and call.window is None and halves.is_faster(folded, keys):
            masks = self._halved_mask(index, fold, mask)
            attended = halves.attend_in_halves(folded, keys, values, masks, call.scaling)
        elif call.softcap is None:
            attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=call.scaling)
        else:
            attended = _soft_capped_attention(folded, keys, values, mask, call.scaling, call.softcap)
        if max_rows == 1:
            return attended.reshape(batch, -1)
        return (
            attended.view(batch, -1, fold, max_rows, attended.shape[-1])
            .permute(0, 3, 1, 2, 4)
            .reshape(batch * max_rows, -1)
        )

    def _mask(self, index: int, fold: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(batch, 1, fold * rows, kv) of 0 where a row may look and -inf elsewhere."""
        key = (index, fold, window)
        if key not in self._masks:
            group = self._layout.groups[index]
            visible = _visible(group, self._pool.block_size, window)
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            self._masks[key] = mask.unsqueeze(1).repeat(1, fold, 1, 1).flatten(1, 2).unsqueeze(1)
        return self._masks[key]

    def _halved_mask(self, index: int, fold: int, mask: torch.Tensor) -> torch.Tensor:
        key = (index, fold)
        if key not in self._halved_masks:
            self._halved_masks[key] = halves.halve_mask(mask)
        return self._halved_masks[key]


def _visible(group: AttentionGroup, block_size: int, window: int | None) -> torch.Tensor:
    """(batch, rows, kv): a row sees its own position and those before, `window` positions at most."""
    kv_positions = torch.arange(group.blocks.shape[1] * block_size, device=group.blocks.device)
    row_positions = group.row_positions.unsqueeze(-1)
    visible = kv_positions <= row_positions
    return visible if window is None else visible & (kv_positions > row_positions - window)


def _soft_capped_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores s become softcap * tanh(s / softcap) (Gemma 2, section 2), softmax in float32."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap + mask
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), values)


class ProbeStep(AttentionStep):
    """Stands in for a step to learn what a model's layers ask for, in call order; computes nothing."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []
        self.shapes: list[LayerShape] = []
        self.folds: list[int] = []

    def attend(self, call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.calls.append(call)
        self.shapes.append(LayerShape(key.shape[1], key.shape[2], value.shape[2]))
        self.folds.append(query.shape[1] // key.shape[1])
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
