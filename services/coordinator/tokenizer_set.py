"""The tokenizers of the models that are served.

Owns: which model has which. Must not know: workers, requests.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.common.errors import ConfigError, FailedPrecondition
from services.coordinator.tokenizer import Tokenizer, load_tokenizer

ANY = ""


class TokenizerSet:
    """By model name; one under the name ANY is that of every model."""

    def __init__(self, by_model: Mapping[str, Tokenizer]) -> None:
        self._by_model = dict(by_model)

    @classmethod
    def load(cls, sources: Mapping[str, str]) -> TokenizerSet:
        """Reads the directories; takes long. Raises ConfigError."""
        return cls({model: load_tokenizer(source) for model, source in sources.items()})

    def find(self, model: str) -> Tokenizer | None:
        return self._by_model.get(model) or self._by_model.get(ANY)

    def get(self, model: str) -> Tokenizer:
        """Raises FailedPrecondition MODEL_MISMATCH for a model that this coordinator has no tokenizer for."""
        if tokenizer := self.find(model):
            return tokenizer
        raise FailedPrecondition("MODEL_MISMATCH", f"this coordinator has no tokenizer for the model {model}")

    @property
    def vocab_size(self) -> int:
        """Of the largest."""
        return max(tokenizer.vocab_size for tokenizer in self._by_model.values())


def parse_tokenizers(text: str) -> dict[str, str]:
    """Of DIRECTORY, or MODEL=DIRECTORY,...; by model name. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ConfigError("tokenizer: name the target's tokenizer directory, or `simulated`")
    if len(parts) == 1 and "=" not in parts[0]:
        return {ANY: parts[0]}
    sources: dict[str, str] = {}
    for part in parts:
        model, equals, source = part.partition("=")
        if not (model and equals and source):
            raise ConfigError(f"tokenizer: {part!r} among several is not MODEL=DIRECTORY")
        if model in sources:
            raise ConfigError(f"tokenizer: {model} has several")
        sources[model] = source
    return sources
