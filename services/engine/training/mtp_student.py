"""Several heads on the target's features in training: every head at every token, in one pass of the target.

Owns: what the heads see and what they learn. Must not know: losses, schedules, how heads are served.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from services.engine.mtp_heads import foresee
from services.engine.trained_draft import MTP, Ends
from services.engine.training.corpus import Batch
from services.engine.training.feature_student import LoadedTarget, known_features
from services.engine.training.student import Student


class MtpStudent(Student):
    """As Student, without layers; `passes` gives one hidden state a token for each head."""

    def __init__(self, config: Any, ends: Ends, head_ids: Tensor, target: LoadedTarget, num_heads: int) -> None:
        self._num_heads = num_heads
        super().__init__(config, ends, head_ids, MTP)
        self.target = target

    def add_inputs(self) -> None:
        """At the start each head gives back the state that it sees."""
        width = self.config.get_text_config().hidden_size
        self.mtp_down = torch.nn.Parameter(torch.randn(self._num_heads, width, 2 * width) * (2 * width) ** -0.5)
        self.mtp_up = torch.nn.Parameter(torch.zeros(self._num_heads, width, width))

    def trained(self) -> dict[str, torch.nn.Parameter]:
        heads = {"mtp_down": self.mtp_down, "mtp_up": self.mtp_up}
        return heads | {"output_projection": self.output_projection}

    def passes(self, batch: Batch, num_passes: int, cut: bool = False) -> list[Tensor]:
        """Hidden states [B, T, width]: of pass j at t from what was committed up to t - j, for the token behind t."""
        embedded = torch.nn.functional.embedding(batch.tokens, self.embedding)
        features = known_features(self.target, batch, cut).to(embedded.dtype)
        found: list[Tensor] = []
        for place in range(min(num_passes, self._num_heads)):
            hidden = foresee(embedded, features, self.mtp_down[place], self.mtp_up[place])
            found.append(torch.nn.functional.pad(hidden, (0, 0, place, 0))[:, : embedded.shape[1]])
        return found
