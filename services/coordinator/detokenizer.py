"""Tokens → text, one token at a time.

Owns: holding back what may still change: incomplete characters here, possible stop strings in stop_search.
Must not know: rounds, sessions, sampling. The text is a function of the tokens alone: however they are grouped, the
concatenation of what `push` and `flush` return is the same.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol


class TextStream(Protocol):
    """The text of one generation. `push` in order of the tokens, `flush` once at the end."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        ...

    def flush(self) -> str:
        """What was held back: an incomplete character becomes U+FFFD."""
        ...


class ByteTextStream:
    """For vocabularies where each token is a fixed string of bytes (byte-level BPE): the text is their UTF-8.

    `token_bytes` lacks the tokens that shall not appear; they add nothing, not even an end to an incomplete character.
    """

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes.get(token_id, b""))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowTextStream:
    """For vocabularies where a token's text depends on its neighbours (SentencePiece): decodes a short sliding window.

    The text of a token is what it adds to the decoding of the window before it. `context` are the tokens of the prompt,
    whose last ones begin the window, so that a leading space survives. Whatever decodes to a text ending in U+FFFD is
    held back, for at most `MAX_HELD_TOKENS` tokens: no character takes more. The window begins with a whole character:
    decoders make U+FFFD of every byte token in a row of which one character is incomplete.

        window   [ text is out )[ held back )
    """

    MAX_HELD_TOKENS = 4
    NUM_CONTEXT_TOKENS = 4

    def __init__(self, decode: Callable[[list[int]], str], hidden: frozenset[int], context: Sequence[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._begin_with([token_id for token_id in context if token_id not in hidden])

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_held = len(self._window) - self._num_done
        if text.endswith("\ufffd") and num_held < self.MAX_HELD_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window)) if len(self._window) > self._num_done else ""

    def _advance(self, text: str) -> str:
        new = (
            text[len(self._done_text) :]
            if text.startswith(self._done_text)
            else text[_common_len(text, self._done_text) :]
        )
        self._begin_with(self._window)
        return new

    def _begin_with(self, done: list[int]) -> None:
        """The window's first tokens: the last NUM_CONTEXT_TOKENS, and those before them of the same character."""
        for num in range(self.NUM_CONTEXT_TOKENS, self.NUM_CONTEXT_TOKENS + self.MAX_HELD_TOKENS):
            self._window = done[-num:]
            self._num_done = len(self._window)
            self._done_text = self._decode(self._window)
            if not self._done_text.startswith("\ufffd"):
                break


def _common_len(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
