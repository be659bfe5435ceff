"""Keeps what a model's head is given: the final hidden states of a step's rows, which drafters call features.

Owns: where they lie until they are read. Must not know: who reads them, sequences, what they mean. On CUDA they are
copied into a buffer whose address never changes, so that a recorded step fills it when it is replayed.
"""

from __future__ import annotations

from typing import Any

import torch


class FeatureTap:
    """Of one transformers model, from now on. `num_buffered`: the most rows of a step that may be recorded."""

    def __init__(self, module: Any, num_buffered: int = 0) -> None:
        self._num_buffered = num_buffered
        self._buffer: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        module.get_output_embeddings().register_forward_pre_hook(self._keep)

    def rows(self, num_rows: int) -> torch.Tensor:
        """The hidden states (num_rows, width) behind the logits of the last step; valid until the next."""
        kept = self._buffer if num_rows <= self._num_buffered else self._last
        if kept is None:
            raise RuntimeError("no step has been computed yet")
        return kept[:num_rows]

    def _keep(self, head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        hidden = arguments[0].flatten(0, -2)
        if len(hidden) > self._num_buffered:
            self._last = hidden
            return
        if self._buffer is None:
            self._buffer = hidden.new_zeros(self._num_buffered, hidden.shape[1])
        self._buffer[: len(hidden)].copy_(hidden)
