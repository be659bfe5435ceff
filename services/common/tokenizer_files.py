"""What the files beside tokenizer.json say: named special tokens, and the ids that end a sequence.

Owns: which files and fields count. Must not know: any tokenizer library, who asks (coordinator and draft worker do).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from services.common.errors import ConfigError


def read_json(path: Path) -> Mapping[str, object]:
    """The file's object; empty where there is none. Raises ConfigError for what is not JSON."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"tokenizer: {path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def special_tokens(*sources: Mapping[str, object]) -> dict[str, str]:
    """bos_token and the like by name; each is a string, or an object with `content`."""
    found: dict[str, str] = {}
    for source in reversed(sources):
        for name, value in source.items():
            content = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(content, str):
                found[name] = content
    return found


def eos_token_ids(directory: Path, vocab: Mapping[str, int], special: Mapping[str, str]) -> frozenset[int]:
    """The model's own list where there is one; else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(directory / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if found := frozenset(token_id for token_id in ids if isinstance(token_id, int)):
            return found
    eos = special.get("eos_token", "")
    return frozenset({vocab[eos]}) if eos in vocab else frozenset()
