"""Finds stop strings in a growing text.

Owns: where a text is cut, and how much of it must wait. Must not know: tokens.
Invariant: what is held back is the longest suffix of the text that is a proper prefix of a stop string, so that every
match that is completed later begins inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Found(NamedTuple):
    """Text that is certain now, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopSearch:
    """Of all occurrences of all stop strings the one that ends first counts; of those ending together, the longest.

    The result is a function of the text alone, never of how it was divided. After `stopped` nothing more is taken.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> Found:
        if not self._stops:
            return Found(text, False)
        if not text:
            return Found("", False)
        whole = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := whole.find(stop)) >= 0]
        if ends:
            self._held = ""
            return Found(whole[: min(ends)[1]], True)
        num_held = self._num_held(whole)
        self._held = whole[len(whole) - num_held :]
        return Found(whole[: len(whole) - num_held], False)

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
