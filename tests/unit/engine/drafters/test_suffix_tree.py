"""The suffix tree and the memory of outputs against counting by a search over all positions."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.drafters.output_memory import NODE_BYTES, OutputMemory
from services.engine.drafters.suffix_tree import Follower, SuffixTree

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=6)


def searched(texts: list[list[int]], context: list[int]) -> Follower | None:
    """The specification: every position of every text."""
    counts: Counter[int] = Counter()
    last: dict[int, tuple[int, int]] = {}
    for number, text in enumerate(texts):
        for end in range(len(context), len(text)):
            if text[end - len(context) : end] == context:
                counts[text[end]] += 1
                last[text[end]] = (number, end)
    if not counts:
        return None
    best = max(counts, key=lambda token: (counts[token], last[token]))
    return Follower(best, counts[best], counts.total())


def num_substrings(texts: list[list[int]], max_depth: int) -> int:
    ends = ((text, start, n) for text in texts for start in range(len(text)) for n in range(1, max_depth + 1))
    return len({tuple(text[start : start + n]) for text, start, n in ends if start + n <= len(text)})


def check(tree: SuffixTree, texts: list[list[int]]) -> None:
    for text in [*texts, [0, 1, 2, 0], [1, 1, 1, 1]]:
        for end in range(1, len(text) + 1):
            for num in range(1, min(end, tree.max_context_len) + 1):
                context = text[end - num : end]
                assert tree.follower(context) == searched(texts, context), context
            longest = min(end, tree.max_context_len)
            expected = next((n for n in range(longest, 0, -1) if searched(texts, text[end - n : end])), 0)
            assert tree.match(text[:end]) == expected
    assert tree.num_nodes <= num_substrings(texts, tree.max_context_len + 1)


@settings(deadline=None, max_examples=150)
@given(TEXTS, st.integers(2, 7), st.data())
def test_followers_are_what_a_search_over_all_positions_finds(texts, max_depth, data) -> None:
    tree = SuffixTree(max_depth)
    added = []
    for text in texts:
        added.append(tree.new_text())
        for token in text:
            tree.append(added[-1], token)
    check(tree, texts)
    num_removed = data.draw(st.integers(0, len(texts)))
    for text in added[:num_removed]:
        tree.remove(text)
    check(tree, texts[num_removed:])
    if num_removed == len(texts):
        assert tree.num_nodes == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2), max_size=40))
def test_a_growing_text_is_searched_up_to_its_end(text) -> None:
    tree = SuffixTree(5)
    growing = tree.new_text()
    for end, token in enumerate(text, start=1):
        tree.append(growing, token)
        for num in range(1, min(end, 4) + 1):
            assert tree.follower(text[end - num : end]) == searched([text[:end]], text[end - num : end])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), max_size=24)), max_size=10), st.integers(5, 80)
)
def test_the_memory_keeps_the_newest_outputs_that_its_bound_allows(outputs, max_nodes) -> None:
    memory = OutputMemory(max_nodes, max_depth=5)
    kept: list[tuple[int, list[int]]] = []
    for number, (group, text) in enumerate(outputs):
        memory.remember(group, text, seed=number)
        assert memory.num_nodes <= max_nodes
        kept += [(group, text)] if text else []
        kept = kept[len(kept) - memory.num_outputs :]
        for g in (0, 1):
            tree, texts = memory.tree(g), [text for group, text in kept if group == g]
            assert (tree is None) == (not texts)
            if tree is not None:
                check(tree, texts)


def test_no_more_is_forgotten_than_the_bound_asks_for() -> None:
    memory = OutputMemory(max_nodes=10, max_depth=4)
    memory.remember("a", [1, 2, 3], seed=7)  # three nodes: nothing in it occurs twice
    memory.remember("a", [4, 5, 6], seed=8)
    memory.remember("b", [1, 2, 3], seed=7)
    assert (memory.num_outputs, memory.num_nodes) == (3, 9)
    memory.remember("a", [7, 8], seed=9)
    assert (memory.num_outputs, memory.num_nodes) == (3, 8)
    assert not memory.has_seed("a", 7)
    assert memory.has_seed("b", 7)
    assert memory.has_seed("a", 8)


def test_an_output_too_long_for_the_memory_is_forgotten_at_once() -> None:
    memory = OutputMemory(max_nodes=10, max_depth=4)
    memory.remember("a", [1, 2], seed=1)
    memory.remember("a", list(range(20)), seed=2)
    assert (memory.num_outputs, memory.num_nodes, memory.tree("a")) == (0, 0, None)
    assert not memory.has_seed("a", 2)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_node_takes_no_more_memory_than_is_reckoned(repeated) -> None:
    text = random.Random(1).choices(range(1000), k=4_000)
    gc.collect()
    tracemalloc.start()
    try:
        memory = OutputMemory(1 << 20, max_depth=16)
        memory.remember("a", text)
        if repeated:
            memory.remember("a", text)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used <= memory.num_nodes * NODE_BYTES


def test_a_loop_costs_no_more_than_the_depth_allows() -> None:
    tree = SuffixTree(8)
    text = tree.new_text()
    for _ in range(2_000):
        tree.append(text, 1)
    assert tree.num_nodes <= 8
    assert len(text.active) <= 8


def test_a_tree_without_room_for_context_and_follower_is_refused() -> None:
    with pytest.raises(ValueError, match="max_depth"):
        SuffixTree(1)
