"""The identities of a model directory: of all that determines its logits and tokens, and of its vocabulary.

Owns: which files count, and the cache of their digest beside them. Must not know: torch, how a model is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from services.common.errors import ModelUnsupported
from services.common.vocab import vocab_digest

CACHE_FILE = ".outrider-digest.json"

_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
_TOKENIZER_PATTERNS = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def model_digest(directory: Path) -> str:
    """SHA-256 in hexadecimal over names and contents of the safetensors, config and tokenizer files, in order of name.

    Reading the weights takes seconds, so the result is kept in the directory, valid while every file keeps its size and
    modification time; a directory that cannot be written to costs the reading each time.
    """
    files = sorted({file for pattern in _PATTERNS + _TOKENIZER_PATTERNS for file in directory.glob(pattern)})
    state = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    cached = _read_cache(directory / CACHE_FILE)
    if cached is not None and cached[0] == state:
        return cached[1]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(f"{file.name}\0".encode() + hashlib.file_digest(content, "sha256").digest())
    with contextlib.suppress(OSError):
        _write_cache(directory / CACHE_FILE, state, digest.hexdigest())
    return digest.hexdigest()


def _read_cache(path: Path) -> tuple[object, str] | None:
    try:
        content = json.loads(path.read_text())
        return content["files"], str(content["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(path: Path, files: dict[str, list[int]], digest: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump({"files": files, "digest": digest}, file)
        Path(temporary).replace(path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def directory_vocab_digest(directory: Path) -> str:
    """The vocabulary's digest, added tokens included. Raises ModelUnsupported for an unreadable tokenizer.json."""
    path = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelUnsupported(f"{path} cannot be read: {error}") from error
    return vocab_digest(tokenizer.get_vocab(with_added_tokens=True))
