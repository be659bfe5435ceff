"""A head on the target's features in training: several passes over a batch, each on the features of the one before.

Owns: which features a token has, and the passes. Must not know: losses, schedules. The target's features are computed
anew in every step: that costs about as much as the passes themselves, and storing them would take 2 bytes times the
target's width a token, four times the rest of a shard for 576 and thirty times for 4,096.

In service the target tells the features of what it generates, so here those of answers are known; and for some
conversations only those from some point on, as for a sequence that was opened there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from services.engine import paged_attention
from services.engine.feature_input import join
from services.engine.trained_draft import FEATURES, Ends
from services.engine.training.corpus import Batch
from services.engine.training.student import Student
from services.engine.training.unrolled_attention import UnrolledAttention

CUT_SHARE = 0.25
"""How many conversations begin without features."""


class FeatureStudent(Student):
    """As Student; `passes` gives one hidden state a token for each drafted token in a row."""

    def __init__(self, config: Any, ends: Ends, head_ids: Tensor, target: Any) -> None:
        """`target`: the target without its head, in evaluation mode; it stays as it is."""
        paged_attention.register()
        super().__init__(config, ends, head_ids, FEATURES, paged_attention.IMPLEMENTATION)
        self.target = target.requires_grad_(False)

    def add_inputs(self) -> None:
        """At the start features count for nothing, so that the head begins as a draft without them."""
        width = self.config.get_text_config().hidden_size
        self.feature_projection = torch.nn.Parameter(torch.zeros(width, width))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return super().trained() | {"feature_projection": self.feature_projection}

    def passes(self, batch: Batch, num_passes: int, cut: bool = False) -> list[Tensor]:
        """Hidden states [B, T, width]: of pass j at t for the (j + 1)-th token of a draft, the one behind token t."""
        num_lines, line_len = batch.tokens.shape
        attention = UnrolledAttention(num_lines, line_len)
        embedded = torch.nn.functional.embedding(batch.tokens, self.embedding) @ self.input_projection.T
        features = known_features(self.target, batch, cut)
        found: list[Tensor] = []
        for _ in range(num_passes):
            attention.begin_pass()
            inputs = join(embedded, features.to(embedded.dtype), self.feature_projection)
            positions = torch.arange(line_len, device=inputs.device).repeat(num_lines)[None]
            hidden = self.base(
                inputs_embeds=inputs.flatten(0, 1)[None],
                position_ids=positions,
                use_cache=False,
                paged_step=attention,
            ).last_hidden_state.view(num_lines, line_len, -1)
            found.append(hidden)
            features = _behind(hidden)
        return found


def known_features(target: Any, batch: Batch, cut: bool) -> Tensor:
    """Before each token the target's hidden state, [B, T, hidden]; zeros where service would not tell it."""
    with torch.no_grad():
        hidden = target(input_ids=batch.tokens, use_cache=False).last_hidden_state
    known = batch.answered & _behind_cuts(batch.tokens) if cut else batch.answered
    return _behind(hidden) * known[..., None]


def load_target(directory: Path, dtype: torch.dtype) -> Any:
    """The target in `directory` without its head."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
    )
    return model.base_model.eval()


def _behind(hidden: Tensor) -> Tensor:
    """Each token gets the hidden state before it, the first one zeros."""
    return torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]


def _behind_cuts(tokens: Tensor) -> Tensor:
    """[B, T]: which tokens stand behind their line's cut, if it has one; drawn by what the batch holds."""
    num_lines, line_len = tokens.shape
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    cuts = torch.randint(line_len, (num_lines, 1), generator=generator)
    cuts *= torch.rand(num_lines, 1, generator=generator) < CUT_SHARE
    return (torch.arange(line_len) >= cuts).to(tokens.device)
