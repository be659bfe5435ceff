"""Text and messages ↔ token ids of the target's vocabulary.

Owns: reading a tokenizer's directory (tokenizer.json, tokenizer_config.json, chat template, EOS ids).
Must not know: models, torch, transformers. Encoding is CPU work that may take long: call it off the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from services.common.errors import ConfigError, FailedPrecondition
from services.common.tokenizer_files import eos_token_ids, read_json, special_tokens
from services.common.vocab import SIMULATED_EOS, byte_level_bytes, simulated_vocab, vocab_digest
from services.coordinator.chat_template import ChatTemplate, Message
from services.coordinator.detokenizer import ByteTextStream, TextStream, WindowTextStream

SIMULATED = "simulated"


class Tokenizer(Protocol):
    """What the coordinator needs of a vocabulary. Safe to call from several threads."""

    @property
    def vocab_digest(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, *, continues: bool) -> list[int]:
        """Ids of plain text. `continues`: it follows other tokens, so nothing is put before it (no BOS)."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the reply begins. Raises InvalidArgument, FailedPrecondition."""
        ...

    def text_stream(self, *, include_special_tokens: bool, context: Sequence[int]) -> TextStream:
        """A new stream of text that follows the tokens `context`."""
        ...


def load_tokenizer(source: str) -> Tokenizer:
    """`simulated`, or a directory with tokenizer.json. Raises ConfigError if there is none."""
    return SimulatedTokenizer() if source == SIMULATED else DirectoryTokenizer(Path(source))


class SimulatedTokenizer:
    """Each byte of UTF-8 is a token; 256 ends. For tests and simulated workers."""

    def __init__(self) -> None:
        self._bytes = {byte: bytes([byte]) for byte in range(256)}
        self._bytes_and_special = {**self._bytes, SIMULATED_EOS: b"<eos>"}
        vocab = simulated_vocab()
        self.vocab_digest = vocab_digest(vocab)
        self.vocab_size = len(vocab)
        self.eos_token_ids = frozenset({SIMULATED_EOS})

    def encode(self, text: str, *, continues: bool) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        token_ids: list[int] = []
        for message in messages:
            token_ids += f"{message.role}: {message.content}".encode()
            token_ids.append(SIMULATED_EOS)
        return token_ids + list(b"assistant: ")

    def text_stream(self, *, include_special_tokens: bool, context: Sequence[int]) -> TextStream:
        return ByteTextStream(self._bytes_and_special if include_special_tokens else self._bytes)


class DirectoryTokenizer:
    """A Hugging Face tokenizer as its directory describes it."""

    def __init__(self, directory: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError(f"tokenizer: cannot read {directory / 'tokenizer.json'}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_json(directory / "tokenizer_config.json")
        special = special_tokens(config, read_json(directory / "special_tokens_map.json"))
        source = _template_source(directory, config)
        self._template = ChatTemplate(source, special) if source else None
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_digest = vocab_digest(vocab)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        self.eos_token_ids = eos_token_ids(directory, vocab, special)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._all_bytes: Mapping[int, bytes] | None = None
        if _is_byte_level(self._tokenizer):
            added_bytes = {token_id: token.content.encode() for token_id, token in added.items()}
            self._all_bytes = {token_id: byte_level_bytes(token) for token, token_id in vocab.items()} | added_bytes
            self._plain_bytes = {i: data for i, data in self._all_bytes.items() if i not in self._special_ids}

    def encode(self, text: str, *, continues: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=not continues).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if self._template is None:
            raise FailedPrecondition(
                "UNSUPPORTED", "the model has no chat template: send plain text or token ids instead", field="chat"
            )
        return list(self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids)

    def text_stream(self, *, include_special_tokens: bool, context: Sequence[int]) -> TextStream:
        if self._all_bytes is not None:
            return ByteTextStream(self._all_bytes if include_special_tokens else self._plain_bytes)
        hidden = frozenset[int]() if include_special_tokens else self._special_ids
        return WindowTextStream(lambda ids: self._tokenizer.decode(ids, skip_special_tokens=False), hidden, context)


def _template_source(directory: Path, config: Mapping[str, object]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    return isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
