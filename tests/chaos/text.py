"""What text tokens stand for, apart from the coordinator's own way of finding it out token by token.

Owns: that reference. Must not know: streams, records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers

from services.cli.cluster import SIMULATED

_NUM_BYTES = 256
"""Of the simulated vocabulary, whose other tokens have no text."""


def text_of_tokens(tokenizer: str) -> Callable[[Sequence[int]], str]:
    """`simulated`, or a directory with tokenizer.json. Decodes all tokens of a reply at once."""
    if tokenizer == SIMULATED:
        return lambda token_ids: bytes(i for i in token_ids if i < _NUM_BYTES).decode(errors="replace")
    decoder = tokenizers.Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    return lambda token_ids: str(decoder.decode(list(token_ids), skip_special_tokens=True))
