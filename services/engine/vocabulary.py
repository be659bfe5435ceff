"""A tokenizer seen from outside: the bytes that each token stands for, and text to ids.

Owns: what is read off a tokenizer's directory. Must not know: torch, other vocabularies, sequences.

    text token      stands for bytes, which may be part of a character
    special token   stands for no text: known by its content, and by its role (begin or end of a sequence)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.common.errors import ModelUnsupported
from services.common.tokenizer_files import eos_token_ids, read_json, special_tokens
from services.common.vocab import byte_level_bytes, vocab_digest

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_WITHIN = re.compile(r"[^\W_] ")
_PROBE = "A1 Bc x  1a \nZ, y"


@dataclass(frozen=True, slots=True)
class Roles:
    """Ids of the special tokens that begin and end a sequence."""

    bos: frozenset[int] = frozenset()
    eos: frozenset[int] = frozenset()


class Vocabulary:
    """One tokenizer. Raises ModelUnsupported where its tokens cannot be told as bytes."""

    def __init__(self, tokenizer: Tokenizer, roles: Roles | None = None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.roles = roles or Roles()
        token_to_id = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.digest = vocab_digest(token_to_id)
        self.size = 1 + max(token_to_id.values(), default=-1)
        """One more than the highest id."""
        self.special: Mapping[int, str] = {i: token.content for i, token in added.items() if token.special}
        """Contents of the special tokens."""
        steps = _decoder_steps(tokenizer)
        texts = {i: _bytes_of(token, steps) for token, i in sorted(token_to_id.items(), key=lambda pair: pair[1])}
        texts |= {i: token.content.encode() for i, token in added.items()}
        self.bytes_of: Mapping[int, bytes] = {i: data for i, data in texts.items() if i not in self.special and data}
        """Of the text tokens."""
        self.id_of: Mapping[bytes, int] = {data: i for i, data in sorted(self.bytes_of.items(), reverse=True)}
        """The lowest id of those bytes."""
        self._longest = max(map(len, self.id_of), default=0)
        self.strips_space = _strips_space(steps)
        """Decoding takes one space off the beginning of a text, which encoding had put there."""
        self.prefix_ids = self._prefix()
        """Tokens that encoding puts before every text (a BOS)."""
        self.splits_at_spaces = self._splits_at_spaces()
        """Whether text may be cut where a letter or digit meets a space, and encoded in parts."""

    def __len__(self) -> int:
        """Tokens, special ones included."""
        return len(self.bytes_of) + len(self.special)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with nothing put before or behind it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def match(self, data: bytes) -> list[int]:
        """Ids of bytes, always taking the longest token; ends where none fits."""
        ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self.id_of), None)
            if end is None:
                break
            ids.append(self.id_of[data[start:end]])
            start = end
        return ids

    def _prefix(self) -> tuple[int, ...]:
        plain, whole = self.encode("a"), list(self._tokenizer.encode("a").ids)
        at = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:at])

    def _splits_at_spaces(self) -> bool:
        if any(_SPACE_WITHIN.search(data.decode(errors="replace")) for data in self.bytes_of.values()):
            return False
        cuts = [match.start() + 1 for match in _SPACE_WITHIN.finditer(_PROBE)]
        return all(self.encode(_PROBE) == self.encode(_PROBE[:cut]) + self.encode(_PROBE[cut:]) for cut in cuts)


def load_vocabulary(directory: Path) -> Vocabulary:
    """The vocabulary of a model's or tokenizer's directory. Raises ModelUnsupported, ConfigError."""
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelUnsupported(f"{path} cannot be read: {error}") from error
    ids = tokenizer.get_vocab(with_added_tokens=True)
    named = special_tokens(
        read_json(directory / "tokenizer_config.json"), read_json(directory / "special_tokens_map.json")
    )
    bos, eos = ({ids[named[name]]} if named.get(name) in ids else set() for name in ("bos_token", "eos_token"))
    known = eos_token_ids(directory, ids, named) & frozenset(ids.values())
    return Vocabulary(tokenizer, Roles(frozenset(bos), known | eos))


_Steps = list[dict[str, Any]]


def _decoder_steps(tokenizer: Tokenizer) -> _Steps:
    """The decoder's description, a step each. Raises ModelUnsupported for one that is not made of tokens' own bytes."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    if decoder is None:
        raise ModelUnsupported("its tokenizer has no decoder: what its tokens stand for is not known")
    steps: _Steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        if step["type"] not in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"):
            raise ModelUnsupported(f"its tokenizer decodes by {step['type']}: its tokens have no text of their own")
    return steps


def _bytes_of(token: str, steps: _Steps) -> bytes:
    """What a text token stands for within a text."""
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                return byte_level_bytes(token)
            case "ByteFallback":
                if byte := _BYTE_TOKEN.fullmatch(token):
                    return bytes([int(byte[1], 16)])
            case "Metaspace":
                token = token.replace(step["replacement"], " ")
            case "Replace" if "String" in step["pattern"]:
                token = token.replace(step["pattern"]["String"], step["content"])
    return token.encode(errors="replace")


def _strips_space(steps: _Steps) -> bool:
    return any(
        (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        or (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)
        for step in steps
    )
