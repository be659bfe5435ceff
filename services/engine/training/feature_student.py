"""A head on the target's features in training: several passes over a batch, each on the features of the one before.

Owns: which features a token has, and the passes. Must not know: losses, schedules. Where the self-play was kept without
the target's features, they are computed anew in every step, which costs about as much as the passes themselves.

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

    def __init__(self, config: Any, ends: Ends, head_ids: Tensor, target: LoadedTarget) -> None:
        paged_attention.register()
        super().__init__(config, ends, head_ids, FEATURES, paged_attention.IMPLEMENTATION)
        self.target = target

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


def known_features(target: LoadedTarget, batch: Batch, cut: bool) -> Tensor:
    """Before each token the target's hidden state, [B, T, hidden]; zeros where service would not tell it."""
    known = batch.answered & _behind_cuts(batch.tokens) if cut else batch.answered
    features = _behind(target.hidden_states(batch.tokens)) if batch.features is None else batch.features
    return features * known[..., None]


class LoadedTarget:
    """The target in `directory` without its head, loaded when it is first asked."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self._directory, self._dtype = directory, dtype
        self._model: Any = None

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Its final hidden states [B, T, hidden] of tokens [B, T], on their device."""
        if self._model is None:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self._directory,
                dtype=self._dtype,
                attn_implementation="sdpa",
                trust_remote_code=False,
                local_files_only=True,
            )
            self._model = model.base_model.to(tokens.device).eval().requires_grad_(False)
        hidden: Tensor = self._model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden


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
