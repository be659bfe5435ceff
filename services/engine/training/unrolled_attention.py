"""Attention of a head on features over whole conversations, a proposal being drafted at every position at once.

Owns: what each pass may see. Must not know: models, features, losses. Pass 0 has the target's features; in pass j
token p is the j-th drafted one behind the commit of token p - j, so that it sees what it would see in service:

    pass 0 at positions 0 .. p - j,  pass 1 at p - j + 1,  pass 2 at p - j + 2,  ...,  itself
                [ committed )                [ drafted, each computed on the draft's own features )

After Li et al. 2025, "EAGLE-3", section 3.2 (training-time test).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.paged_attention import LayerCall, Rotation


class UnrolledAttention:
    """An AttentionStep (services.engine.paged_attention) over `num_lines` lines of `line_len` tokens, end to end."""

    def __init__(self, num_lines: int, line_len: int) -> None:
        self._shape = num_lines, line_len
        self._passes: list[dict[int, tuple[Tensor, Tensor]]] = []

    def begin_pass(self) -> None:
        self._passes.append({})

    def rotation(self, embeddings: tuple[Tensor, Tensor]) -> Rotation:
        return Rotation.of(embeddings)

    def attend(self, call: LayerCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As AttentionStep.attend. Keys and values stay for the passes that follow."""
        fold = query.shape[1] // key.shape[1]
        key, value = (self._lines(part).repeat_interleave(fold, 1) for part in (key, value))
        query = self._lines(query)
        self._passes[-1][call.layer] = key, value
        scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
        if len(self._passes) == 1 and call.softcap is None and call.window is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        else:
            attended = self._attend_passes(call, query * scale)
        return attended.transpose(1, 2).flatten(0, 1)

    def _attend_passes(self, call: LayerCall, query: Tensor) -> Tensor:
        depth, (keys, values) = len(self._passes) - 1, self._passes[0][call.layer]
        positions = torch.arange(query.shape[2], device=query.device)
        behind = positions[:, None] - positions
        seen = _seen(behind, depth, call.window)
        scores = [_capped(query @ keys.transpose(2, 3), call.softcap).masked_fill(~seen, -torch.inf)]
        drafted = [
            tuple(_shifted(part, depth - i) for part in self._passes[i][call.layer]) for i in range(1, depth + 1)
        ]
        for i, (key, _) in enumerate(drafted, start=1):
            score = _capped((query * key).sum(-1, keepdim=True), call.softcap)
            hidden = positions[:, None] < depth - i
            if call.window is not None and depth - i >= call.window:
                hidden = torch.ones_like(hidden)
            scores.append(score.masked_fill(hidden, -torch.inf))
        weights = torch.softmax(torch.cat(scores, -1).float(), -1).to(values.dtype)
        attended = weights[..., : len(positions)] @ values
        for i, (_, value) in enumerate(drafted):
            attended = attended + weights[..., len(positions) + i, None] * value
        return attended

    def _lines(self, part: Tensor) -> Tensor:
        """(tokens, heads, dim) to (lines, heads, line_len, dim)."""
        return part.view(*self._shape, *part.shape[1:]).transpose(1, 2)


def _seen(behind: Tensor, depth: int, window: int | None) -> Tensor:
    """Which keys of pass 0 a row sees that is `behind` so many positions of each."""
    seen = behind >= depth
    return seen if window is None else seen & (behind < window)


def _shifted(part: Tensor, num: int) -> Tensor:
    """Each position gets what stands `num` positions before it; the first ones get zeros."""
    return F.pad(part, (0, 0, num, 0))[:, :, : part.shape[2]] if num else part


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
