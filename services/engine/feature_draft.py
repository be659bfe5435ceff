"""A draft model that is fed with the target's features, and with its own where the target has not been there yet.

Owns: the features of tokens that are still to be computed. Must not know: proposals, the wire. Invariant: what is
missing, late or wrong costs acceptance alone; a step never waits for features.

    token index        ... n - 1 | n         n + 1      ...        n committed tokens
    its feature        target's  | own       own                   the final hidden state before the token
    whence             a Propose | the draft's row that the token, or what stands in its place, was chosen from

A feature belongs to the tokens before its own, so where a drafted token is replaced the draft's own feature for that
place stays good until the target's comes.
"""

from __future__ import annotations

import logging

import torch

from services.common.errors import ConfigError
from services.common.values import MAX_FEATURE_ROWS, ModelInfo
from services.engine.feature_input import FeatureInput
from services.engine.paged_model import LogitsSampler, PagedEngine, clear_faults
from services.engine.sequence import Sequence
from services.engine.step import Sampled, Work

log = logging.getLogger(__name__)

MAX_HELD_ROWS = 64
"""Features that are held for one sequence; of more the oldest go."""


def takes_features(engine: PagedEngine) -> bool:
    """Whether the model was trained as a head on features."""
    return isinstance(engine.runner.model.module.get_input_embeddings(), FeatureInput)


class FeatureDraftModel:
    """A DraftModel (services.engine.step.DraftModel) for services.engine.drafters.features.FeatureDrafter."""

    def __init__(self, engine: PagedEngine, sampler: LogitsSampler) -> None:
        """Raises ConfigError for a model that takes no features."""
        model = engine.runner.model
        if not takes_features(engine) or model.tap is None:
            raise ConfigError(f"drafter: {engine.info.name} takes no features; outrider train-draft --kind features")
        self._input: FeatureInput = model.module.get_input_embeddings()
        self._tap = model.tap
        self._engine = engine
        self._sampler = sampler
        self._rows: dict[Sequence, dict[int, torch.Tensor]] = {}
        self._is_warned = False

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    def take(self, sequence: Sequence, num_kept: int, features: bytes) -> int:
        """Takes in features of the last committed tokens, those behind `num_kept` being new.

        Returns the index of the first token whose feature is news, or the sequence's length.
        """
        rows = self._rows.setdefault(sequence, {})
        for index in [index for index in rows if index > num_kept]:
            del rows[index]  # the draft's own, behind tokens that were rejected
        first = len(sequence)
        if features:
            table = self._decode(features)[-min(len(sequence), MAX_FEATURE_ROWS) :]
            first -= len(table)
            rows.update(enumerate(table, start=first))
        for index in sorted(rows)[:-MAX_HELD_ROWS]:
            del rows[index]
        return first

    def forget(self, sequence: Sequence) -> None:
        """The sequence is closed."""
        self._rows.pop(sequence, None)

    @torch.inference_mode()
    def step(self, works: list[Work]) -> list[Sampled | None]:
        """As services.engine.paged_model.PagedDraftModel; its own features are kept for the tokens that follow."""
        self._put(works)
        logits = self._engine.runner.forward(works)
        sampled = self._sampler.sample(works, logits)
        clear_faults(self._engine, works, logits, sampled)
        own = iter(torch.nan_to_num(self._tap.rows(len(logits))) if len(logits) else ())
        for work in works:
            if work.num_rows:
                self._rows.setdefault(work.sequence, {})[len(work.sequence)] = next(own)
        return sampled

    def _put(self, works: list[Work]) -> None:
        indices: list[int] = []
        features: list[torch.Tensor] = []
        start = 0
        for work in works:
            rows, first = self._rows.get(work.sequence, {}), work.sequence.num_cached
            known = [index for index in rows if first <= index < first + work.num_new_tokens]
            indices += [start + index - first for index in known]
            features += [rows[index] for index in known]
            start += work.num_new_tokens
        self._input.put(start, indices, features)

    def _decode(self, features: bytes) -> torch.Tensor:
        """float16 rows as a tensor; none where they cannot be this draft's target's."""
        width = self._input.feature_width
        if len(features) % (2 * width):
            if not self._is_warned:
                log.warning("features of %d bytes are no rows of %d: another target's?", len(features), width)
            self._is_warned = True
            return torch.zeros(0, width)
        rows = torch.frombuffer(bytearray(features), dtype=torch.float16).view(-1, width)
        return torch.nan_to_num(rows.to(self._engine.runner.model.device, torch.float32))
