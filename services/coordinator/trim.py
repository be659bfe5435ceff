"""Trim: cuts a round's tokens behind the one that ends the generation, and makes the text of what is left.

Owns: why and where a generation ends, what its tokens read like, and the packed form of log-probabilities.
Must not know: workers, the store, streams. Only what comes out of here is recorded, counted and shown.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.values import FinishReason, TokenOrigin, TopLogProbs
from services.coordinator.detokenizer import TextStream
from services.coordinator.stop_search import StopSearch


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Tokens that the generation keeps. `texts[i]` became certain with token i; `tail` with the end of the generation.

    `log_probs` and `top_log_probs` are empty unless asked for.
    """

    offset: int
    """Position of the first token among the generated ones."""
    token_ids: tuple[int, ...]
    origins: tuple[TokenOrigin, ...]
    texts: tuple[str, ...]
    tail: str
    log_probs: tuple[float, ...]
    top_log_probs: tuple[TopLogProbs, ...]
    finish: FinishReason | None

    def since(self, offset: int) -> Trimmed:
        """Without the tokens before `offset`, which their reader has."""
        skipped = min(max(0, offset - self.offset), len(self.token_ids))
        return Trimmed(
            self.offset + skipped,
            self.token_ids[skipped:],
            self.origins[skipped:],
            self.texts[skipped:],
            self.tail,
            self.log_probs[skipped:],
            self.top_log_probs[skipped:],
            self.finish,
        )

    @property
    def packed_origins(self) -> bytes:
        return bytes(self.origins)


@dataclass(frozen=True, slots=True)
class EndRules:
    """What ends a generation. `max_tokens` counts generated tokens and is at least 1."""

    eos_token_ids: frozenset[int]
    stop_token_ids: frozenset[int]
    stop: tuple[str, ...]
    max_tokens: int


class Trimmer:
    """State of one generation's text and end. Fed with all its tokens in order, however they are grouped."""

    def __init__(self, rules: EndRules, text: TextStream) -> None:
        self._rules = rules
        self._text = text
        self._search = StopSearch(rules.stop)
        self._num_tokens = 0
        self._finish: FinishReason | None = None
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text so far, without what is held back."""
        return "".join(self._parts)

    def trim(
        self,
        token_ids: Sequence[int],
        origins: Sequence[TokenOrigin],
        log_probs: Sequence[float] = (),
        top_log_probs: Sequence[TopLogProbs] = (),
    ) -> Trimmed:
        """Keeps tokens up to the one that ends the generation; after the end, none."""
        offset, texts, tail = self._num_tokens, [], ""
        for token_id in token_ids:
            if self._finish is not None:
                break
            found = self._search.push(self._text.push(token_id))
            texts.append(found.text)
            self._num_tokens += 1
            self._finish = self._reason(token_id, found.stopped)
            if self._finish is not None and not found.stopped:
                tail = self._rest()
        kept = len(texts)
        self._parts += texts
        self._parts.append(tail)
        return Trimmed(
            offset,
            tuple(token_ids[:kept]),
            tuple(origins[:kept]),
            tuple(texts),
            tail,
            tuple(log_probs[:kept]),
            tuple(top_log_probs[:kept]),
            self._finish,
        )

    def _reason(self, token_id: int, stopped: bool) -> FinishReason | None:
        if token_id in self._rules.eos_token_ids:
            return FinishReason.EOS
        if stopped or token_id in self._rules.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self._num_tokens >= self._rules.max_tokens else None

    def _rest(self) -> str:
        return self._search.push(self._text.flush()).text + self._search.flush()


def log_prob_row_bytes(num_top: int) -> int:
    """Bytes of one token's packed log-probabilities."""
    return 4 * (1 + 2 * num_top)


def pack_log_probs(kept: Trimmed, num_top: int) -> bytes:
    """One row a token: its log-probability, then ids and log-probabilities of `num_top` alternatives; little-endian.

    A row that a worker gave fewer alternatives for is filled with NaN. Empty if there are no log-probabilities.
    """
    rows = []
    for i, log_prob in enumerate(kept.log_probs):
        top = kept.top_log_probs[i] if i < len(kept.top_log_probs) else TopLogProbs((), ())
        missing = num_top - len(top.token_ids)
        ids, values = (*top.token_ids, *[0] * missing), (*top.log_probs, *[math.nan] * missing)
        rows.append(struct.pack(f"<f{num_top}I{num_top}f", log_prob, *ids[:num_top], *values[:num_top]))
    return b"".join(rows)


def unpack_log_probs(data: bytes, num_top: int) -> tuple[tuple[float, ...], tuple[TopLogProbs, ...]]:
    """The inverse of pack_log_probs."""
    log_probs, tops = [], []
    for log_prob, *rest in struct.iter_unpack(f"<f{num_top}I{num_top}f", data):
        log_probs.append(log_prob)
        kept = [i for i in range(num_top) if not math.isnan(rest[num_top + i])]
        tops.append(TopLogProbs(tuple(rest[i] for i in kept), tuple(rest[num_top + i] for i in kept)))
    return tuple(log_probs), tuple(tops) if num_top else ()
