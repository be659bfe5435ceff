"""What earlier sequences wrote, as far as it is remembered: suffix trees under one bound.

Owns: the order of the outputs, and which are forgotten. Must not know: drafts, who may be shown what (`group` says so).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from services.engine.drafters.suffix_tree import SuffixTree, Text

NODE_BYTES = 320
"""Memory of a node and its share of the dictionaries and texts, rounded up; a test holds it against the truth."""


class _Output(NamedTuple):
    group: Hashable
    text: Text
    seed: int | None


class OutputMemory:
    """At most `max_nodes` nodes in all trees; the oldest outputs, whole, make room for new ones.

    Outputs of one group are in one tree, and no group sees another's.
    """

    def __init__(self, max_nodes: int, max_depth: int) -> None:
        self._max_nodes = max_nodes
        self._max_depth = max_depth
        self._trees: dict[Hashable, SuffixTree] = {}
        self._outputs: deque[_Output] = deque()
        self._seeds: Counter[tuple[Hashable, int | None]] = Counter()
        self.num_nodes = 0

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def tree(self, group: Hashable) -> SuffixTree | None:
        """What the group wrote; None: nothing."""
        return self._trees.get(group)

    def has_seed(self, group: Hashable, seed: int) -> bool:
        """Whether an output of the group came of noise under `seed`."""
        return (group, seed) in self._seeds

    def remember(self, group: Hashable, tokens: Sequence[int], seed: int | None = None) -> None:
        """Adds an output, unless it is too long; `seed` is that of the noise that chose it, None: nobody will ask."""
        if not tokens:
            return
        tree = self._trees.setdefault(group, SuffixTree(self._max_depth))
        output = _Output(group, tree.new_text(), seed)
        self._outputs.append(output)
        self._seeds[group, seed] += 1
        for token_id in tokens:
            self.num_nodes -= tree.num_nodes
            tree.append(output.text, token_id)
            self.num_nodes += tree.num_nodes
            while self.num_nodes > self._max_nodes:
                if self._forget_oldest() is output:
                    return

    def _forget_oldest(self) -> _Output:
        output = self._outputs.popleft()
        tree, key = self._trees[output.group], (output.group, output.seed)
        self.num_nodes -= tree.num_nodes
        tree.remove(output.text)
        self.num_nodes += tree.num_nodes
        if not tree.num_nodes:
            del self._trees[output.group]
        self._seeds[key] -= 1
        if not self._seeds[key]:
            del self._seeds[key]
        return output
