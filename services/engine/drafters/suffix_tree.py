"""A tree of all substrings up to a depth, with how often each occurs: what followed a context, and how often.

Owns: the tree of any number of texts, growing at their ends, and taking a whole text out again. Must not know: drafts,
sequences, torch. As the suffix trees of SuffixDecoding (Oliaro et al. 2024, "SuffixDecoding: extreme speculative
decoding for emerging AI applications").

    root ─a─▶ node(count of "a") ─b─▶ node(count of "ab") ...        at most max_depth edges deep

A path that occurred once is not spelled out: its node is *folded*, and points at what follows in its text. A second
occurrence that goes on unfolds it by one edge. So a new token costs one node visit for each of its suffixes that
occurred before, at most max_depth, and natural text takes about five nodes a token.

Invariant: of the occurrences that end at a folded node, the one it points at goes on; all others end there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Text:
    """A text in a tree. Appended to by its tree alone."""

    __slots__ = ("active", "start", "tokens")

    def __init__(self, start: int) -> None:
        self.tokens: list[int] = []
        self.start = start
        """When its first token came, counted in tokens of the tree."""
        self.active: list[_Node] = []
        """Of its suffixes of length 0, 1, ...: their nodes, as far as the suffixes occurred before."""


class _Node:
    """The end of one path. Folded where `text` is given: the path goes on once, with text.tokens[at], and so on."""

    __slots__ = ("at", "children", "count", "last", "text")

    def __init__(self, text: Text | None, at: int, last: int) -> None:
        self.count = 1
        self.last = last
        """When the newest occurrence ended, counted in tokens of the tree."""
        self.text = text
        self.at = at
        self.children: dict[int, _Node] = {}


class Follower(NamedTuple):
    """The token that most often follows a context, the one seen last among equals."""

    token_id: int
    num_times: int
    num_followed: int
    """How often anything follows the context."""

    @property
    def prob(self) -> float:
        return self.num_times / self.num_followed


class SuffixTree:
    """Substrings of at most `max_depth` tokens of its texts."""

    def __init__(self, max_depth: int) -> None:
        if max_depth < 2:
            raise ValueError(f"a context and what follows it take 2 tokens: max_depth={max_depth}")
        self._max_depth = max_depth
        self._root = _Node(None, 0, 0)
        self._num_tokens = 0
        self.num_nodes = 0

    @property
    def max_context_len(self) -> int:
        return self._max_depth - 1

    def new_text(self) -> Text:
        """A text without tokens. No other text may grow while it does, unless neither is ever removed."""
        text = Text(self._num_tokens)
        text.active.append(self._root)
        return text

    def append(self, text: Text, token_id: int) -> None:
        """Adds a token at the end of a text."""
        text.tokens.append(token_id)
        end, now = len(text.tokens), self._num_tokens
        self._num_tokens += 1
        active = [self._root]
        for node in text.active:
            self._unfold(node)
            child = node.children.get(token_id)
            if child is None:
                node.children[token_id] = _Node(text, end, now)
                self.num_nodes += 1
            else:
                child.count += 1
                child.last = now
                active.append(child)
        text.active = active[: self._max_depth]

    def remove(self, text: Text) -> None:
        """Takes a text out; what only it said is gone. Its newest occurrences must be older than all others'."""
        tokens = text.tokens
        for start in range(len(tokens)):
            node = self._root
            for at in range(start, min(start + self._max_depth, len(tokens))):
                child = node.children[tokens[at]]
                child.count -= 1
                if not child.count:
                    del node.children[tokens[at]]
                    self.num_nodes -= 1
                if child.text is text and child.at == at + 1:
                    child.text = None
                    break
                node = child

    def match(self, tokens: Sequence[int]) -> int:
        """Length of the longest end of `tokens`, at most max_context_len, that something follows in a text."""
        longest = min(len(tokens), self.max_context_len)
        return next((n for n in range(longest, 0, -1) if self.follower(tokens[len(tokens) - n :])), 0)

    def follower(self, context: Sequence[int]) -> Follower | None:
        """What most often follows `context`, of at most max_context_len tokens."""
        node = self._root
        for index, token_id in enumerate(context):
            if node.text is not None:
                return _folded_follower(node, context[index:])
            child = node.children.get(token_id)
            if child is None:
                return None
            node = child
        if node.text is not None:
            return _folded_follower(node, ())
        if not node.children:
            return None
        token_id, best = max(node.children.items(), key=lambda item: (item[1].count, item[1].last))
        return Follower(token_id, best.count, sum(child.count for child in node.children.values()))

    def _unfold(self, node: _Node) -> None:
        """Spells out the next edge of the only path that goes on from a folded node."""
        text = node.text
        if text is None:
            return
        node.text = None
        if node.at < len(text.tokens):
            node.children[text.tokens[node.at]] = _Node(text, node.at + 1, text.start + node.at)
            self.num_nodes += 1


def _folded_follower(node: _Node, context: Sequence[int]) -> Follower | None:
    """What follows `context` behind a folded node."""
    if node.text is None:
        return None
    tokens, end = node.text.tokens, node.at + len(context)
    if end >= len(tokens) or tokens[node.at : end] != list(context):
        return None
    return Follower(tokens[end], 1, 1)
