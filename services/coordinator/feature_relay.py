"""Features on their way from the target's answers to the draft's next Propose.

Owns: which rows the draft lacks. Must not know: what features are (bytes, equally many a token), links, proposals.
Invariant: the rows held belong to the newest committed tokens, without a gap, and are at most MAX_FEATURE_ROWS.
"""

from __future__ import annotations

from services.common.items import Tokens
from services.common.values import MAX_FEATURE_ROWS


class FeatureRelay:
    """Of one generation. An answer without features makes a gap: what was held before it is dropped."""

    def __init__(self) -> None:
        self._rows: list[bytes] = []
        self._num_told = 0

    def add(self, result: Tokens, num_committed: int) -> None:
        """Takes the rows of an answer of which the first `num_committed` tokens were committed."""
        num_tokens, num_bytes = len(result.token_ids), len(result.features)
        if not num_committed:
            return
        if not num_bytes or num_bytes % num_tokens:
            self._rows, self._num_told = [], 0
            return
        size = num_bytes // num_tokens
        self._rows += [result.features[i * size : (i + 1) * size] for i in range(num_committed)]
        num_dropped = max(0, len(self._rows) - MAX_FEATURE_ROWS)
        self._rows, self._num_told = self._rows[num_dropped:], max(0, self._num_told - num_dropped)

    def take(self) -> bytes:
        """The rows that were not taken yet, of the newest tokens, end to end."""
        rows, self._num_told = self._rows[self._num_told :], len(self._rows)
        return b"".join(rows)

    def rewind(self) -> None:
        """The draft was opened anew: it has been told nothing."""
        self._num_told = 0
