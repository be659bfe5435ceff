"""A sequence of the target's tokens, written again in a draft's own vocabulary; and proposals written back.

Owns: the text in between, and which of the draft's ids may still change. Must not know: torch, caches, proposals.

    target's ids   ->  text of the text tokens, cut at special tokens       ->  the draft's own ids
    own ids        [ stable ........................ )[ encoding of the tail )[ bytes of an unfinished character ]
Text that is added can change how the text before it is encoded, so that only the tail is encoded anew: what stands
behind the last cut where vocabularies never have a token across (Vocabulary.splits_at_spaces). Invariant: own ids are
those of encoding the whole text at once (`rewrite`).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from services.engine.vocabulary import Vocabulary
from services.engine.vocabulary_pair import VocabularyPair

MIN_TAIL_LEN = 32
"""Characters that are encoded anew at least, and the context that a proposal is encoded in."""

_CUT = re.compile(r"(?<=[^\W_]) ")


class Change(NamedTuple):
    """Own ids from `start` on are now `token_ids`; those before are as they were."""

    start: int
    token_ids: list[int]


class Transcript:
    """Grows by committed tokens of the target."""

    def __init__(self, pair: VocabularyPair) -> None:
        self._pair = pair
        self._stable = list(pair.draft.prefix_ids)
        self._tail = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_empty = True
        self._num_told = 0

    @property
    def num_stable(self) -> int:
        """Own ids at the start that will never change."""
        return len(self._stable)

    @property
    def context(self) -> str:
        """The end of the text, up to the last special token."""
        return self._tail[-MIN_TAIL_LEN:]

    @property
    def unfinished(self) -> bytes:
        """Bytes at the end that are not a whole character yet."""
        return self._decoder.getstate()[0]

    @property
    def can_continue(self) -> bool:
        """Whether own ids stand for all that was committed; not where the draft has no tokens for unfinished bytes."""
        draft = self._pair.draft
        return b"".join(draft.bytes_of[i] for i in draft.match(self.unfinished)) == self.unfinished

    def extend(self, target_ids: Iterable[int]) -> Change:
        """Adds tokens of the target. Ids that it does not have stand for nothing."""
        start = self._num_told
        for token_id in target_ids:
            if token_id in self._pair.target.special:
                self._add_special(token_id)
            else:
                self._add_text(self._pair.target.bytes_of.get(token_id, b""))
        if self._pair.draft.splits_at_spaces and len(self._tail) > 2 * MIN_TAIL_LEN:
            self._settle()
        self._num_told = len(self._stable)
        draft = self._pair.draft
        held_back = draft.match(self.unfinished) if self.can_continue else []
        return Change(start, self._stable[start:] + draft.encode(self._tail) + held_back)

    def _add_text(self, data: bytes) -> None:
        text = self._decoder.decode(data)
        if self._is_empty and self._pair.target.strips_space:
            text = text.removeprefix(" ")
        self._tail += text
        self._is_empty = self._is_empty and not data

    def _add_special(self, token_id: int) -> None:
        """A token of the draft, or text; a beginning that the draft does not mark, or has marked, is left out."""
        own_id = self._pair.draft_id_of.get(token_id)
        is_start = not self._tail and self._stable == list(self._pair.draft.prefix_ids)
        if is_start and token_id in self._pair.target.roles.bos and (own_id is None or own_id in self._stable):
            return
        self._tail += self._decoder.decode(b"", final=True)
        if own_id is None:
            self._tail += self._pair.target.special[token_id]
            self._is_empty = False
            return
        self._stable += [*self._pair.draft.encode(self._tail), own_id]
        self._tail = ""

    def _settle(self) -> None:
        """Encodes the text before the last safe cut for good."""
        cuts = [cut.start() for cut in _CUT.finditer(self._tail, 0, len(self._tail) - MIN_TAIL_LEN)]
        if cuts:
            self._stable += self._pair.draft.encode(self._tail[: cuts[-1]])
            self._tail = self._tail[cuts[-1] :]


def rewrite(pair: VocabularyPair, target_ids: Iterable[int]) -> list[int]:
    """The draft's own ids of a whole sequence."""
    return Transcript(pair).extend(target_ids).token_ids


def continuation(target: Vocabulary, context: str, unfinished: bytes, drafted: bytes) -> list[int]:
    """The target's ids of `drafted`, as it stands behind a text and unfinished bytes that are committed already.

    String-level matching after Timor et al. 2025: the text is encoded with the target's tokenizer, in its
    context. Bytes of a token that reaches back into the context are matched by the longest tokens that fit, as are all
    where encoding does not keep the text. An unfinished character at the end is left out.
    """
    known = context.encode() + unfinished
    text = context + codecs.getincrementaldecoder("utf-8")("replace").decode(unfinished + drafted)
    whole = known + drafted
    whole = whole[: len(whole) - _num_unfinished(unfinished + drafted)]
    if len(whole) <= len(known):
        return []
    ids = target.encode(text)
    parts = [target.bytes_of.get(token_id, b"") for token_id in ids]
    encoded = b"".join(parts)
    num_known = len(known) + len(encoded) - len(whole)  # encoding may put a space in front
    if not (encoded == whole or encoded == b" " + whole):
        return target.match(whole[len(known) :])
    ends = list(accumulate(map(len, parts), initial=0))
    index = next(i for i, end in enumerate(ends) if end >= num_known)
    reaching = encoded[num_known : ends[index]]
    head = target.match(reaching)
    is_whole = sum(len(target.bytes_of[i]) for i in head) == len(reaching)
    return head + ids[index:] if is_whole else head


def _num_unfinished(data: bytes) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])
