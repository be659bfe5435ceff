"""Prompt lookup against a search without an index."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.drafters.base import Draft
from services.engine.drafters.ngram import NgramDrafter
from services.engine.sequence import Sequence
from tests.unit.item_builders import open_item

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=20)


def new_draft(tokens: list[int], max_new_tokens: int = 1000, eos: frozenset[int] = frozenset()) -> Draft:
    item = open_item(prefix=tuple(tokens), max_new_tokens=max_new_tokens, eos_token_ids=eos)
    return Draft(Sequence.from_open(item))


def searched(tokens: list[int], num_tokens: int, ngram_min: int, ngram_max: int) -> list[int]:
    """The specification: compare every earlier position, longest match first, latest first."""
    for num in range(ngram_max, ngram_min - 1, -1):
        for end in range(len(tokens) - 1, num - 1, -1):
            if num <= len(tokens) and tokens[end - num : end] == tokens[len(tokens) - num :]:
                copied = list(tokens)
                for index in range(num_tokens):
                    copied.append(copied[end + index])
                return copied[len(tokens) :]
    return []


@settings(deadline=None, max_examples=100)
@given(TOKENS, st.lists(TOKENS, max_size=5), st.integers(1, 2), st.integers(2, 4), st.integers(1, 6))
def test_proposals_are_what_a_search_over_all_positions_finds(
    prefix: list[int], commits: list[list[int]], ngram_min: int, ngram_max: int, num_tokens: int
) -> None:
    drafter, draft = NgramDrafter(ngram_max, ngram_min), new_draft(prefix)
    drafter.open(draft)
    tokens = list(prefix)
    for commit in [[], *commits]:
        tokens += commit
        drafter.commit(draft, draft.commit(tuple(commit)))
        draft.request(num_tokens)
        drafter.step([draft])
        assert list(draft.drafted) == searched(tokens, num_tokens, ngram_min, ngram_max)
        assert draft.num_missing_tokens == 0


def test_a_loop_is_continued_beyond_the_end_of_the_sequence() -> None:
    drafter, draft = NgramDrafter(), new_draft([9, 1, 2, 1, 2])
    drafter.open(draft)
    draft.request(6)
    drafter.step([draft])
    assert draft.drafted == (1, 2, 1, 2, 1, 2)


def test_proposal_ends_behind_an_end_of_sequence_token() -> None:
    drafter, draft = NgramDrafter(), new_draft([1, 2, 8, 5, 1, 2], eos=frozenset({8}))
    drafter.open(draft)
    draft.request(4)
    drafter.step([draft])
    assert draft.drafted == (8,)


def test_tokens_have_no_rows() -> None:
    drafter, draft = NgramDrafter(), new_draft([1, 1, 1])
    drafter.open(draft)
    draft.request(2)
    drafter.step([draft])
    assert draft.proposal(3).rows is None


@pytest.mark.parametrize(("ngram_max", "ngram_min"), [(0, 0), (2, 3), (4, 0)])
def test_impossible_lengths_are_refused(ngram_max: int, ngram_min: int) -> None:
    with pytest.raises(ValueError):
        NgramDrafter(ngram_max, ngram_min)
