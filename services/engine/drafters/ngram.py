"""Drafts by prompt lookup: what followed the last tokens when they last occurred in the same sequence.

Owns: the index of one sequence's n-grams. Must not know: models, blocks, torch. After Saxena 2023 (prompt lookup
decoding). It is deterministic, so its tokens have no rows.
"""

from __future__ import annotations

from services.engine.drafters.base import Draft, Pool
from services.engine.sequence import Sequence

DEFAULT_NGRAM_MAX = 4
DEFAULT_NGRAM_MIN = 1


class _Index:
    """For each n-gram that some token follows: the index of the token that followed it most recently."""

    def __init__(self, ngram_min: int, ngram_max: int) -> None:
        self._ngram_min = ngram_min
        self._ngram_max = ngram_max
        self._follower: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def extend(self, sequence: Sequence) -> None:
        """Adds the committed tokens behind those indexed already. They never change."""
        tokens = sequence.tokens
        for index in range(self._num_indexed, sequence.num_committed):
            for num in range(self._ngram_min, min(self._ngram_max, index) + 1):
                self._follower[tuple(tokens[index - num : index])] = index
        self._num_indexed = sequence.num_committed

    def find(self, tokens: list[int]) -> int | None:
        """Where to copy from: behind the most recent earlier occurrence of the longest tail that occurred before."""
        for num in range(min(self._ngram_max, len(tokens)), self._ngram_min - 1, -1):
            follower = self._follower.get(tuple(tokens[len(tokens) - num :]))
            if follower is not None:
                return follower
        return None


class NgramDrafter:
    """The prompt-lookup Drafter (services.engine.drafters.base.Drafter).

    Looks for the sequence's last n tokens, n from `ngram_max` down to `ngram_min`, and proposes the tokens behind their
    most recent earlier occurrence; where these reach the sequence's end, the copy goes on with what it has proposed, so
    that a loop is continued. A commit costs time in its new tokens only, whatever the sequence's length.
    """

    def __init__(self, ngram_max: int = DEFAULT_NGRAM_MAX, ngram_min: int = DEFAULT_NGRAM_MIN) -> None:
        if not 1 <= ngram_min <= ngram_max:
            raise ValueError(f"n-gram lengths: 1 <= {ngram_min} <= {ngram_max} does not hold")
        self._ngram_max = ngram_max
        self._ngram_min = ngram_min
        self._indexes: dict[Draft, _Index] = {}

    @property
    def kind(self) -> str:
        return "ngram"

    @property
    def info(self) -> None:
        return None

    @property
    def blocks(self) -> None:
        return None

    def pools(self, drafts: list[Draft]) -> list[Pool]:
        return []

    def open(self, draft: Draft) -> None:
        index = _Index(self._ngram_min, self._ngram_max)
        index.extend(draft.sequence)
        self._indexes[draft] = index

    def commit(self, draft: Draft, num_kept: int) -> None:
        """Only committed tokens are indexed, and those never change."""
        self._indexes[draft].extend(draft.sequence)

    def close(self, draft: Draft) -> None:
        del self._indexes[draft]

    def is_ready(self, draft: Draft) -> bool:
        return True

    def has_work(self, drafts: list[Draft]) -> bool:
        return any(draft.num_missing_tokens for draft in drafts)

    def step(self, drafts: list[Draft]) -> list[Draft]:
        """Completes every proposal in progress."""
        taking_part = [draft for draft in drafts if draft.num_missing_tokens]
        for draft in taking_part:
            tokens = draft.sequence.tokens
            source = self._indexes[draft].find(tokens)
            while source is not None and draft.num_missing_tokens:
                draft.add(tokens[source])
                source += 1
            draft.end()
        return taking_part
