"""The suffix drafter: how far it proposes, what it remembers, and whom it shows what."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.values import SamplingParams, VerificationMethod
from services.engine.drafters import suffix
from services.engine.drafters.base import Draft
from services.engine.drafters.ngram import NgramDrafter
from services.engine.drafters.output_memory import OutputMemory
from services.engine.drafters.suffix import MAX_DEPTH, SuffixDrafter, SuffixPolicy
from services.engine.sequence import Sequence
from tests.unit.item_builders import GREEDY, open_item

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=25)
DRAWN = SamplingParams(temperature=1.0, seed=5)
REJECTION = VerificationMethod.REJECTION


def new_draft(
    tokens: list[int],
    *,
    sampling: SamplingParams = GREEDY,
    verification: VerificationMethod = VerificationMethod.COUPLED,
    eos: frozenset[int] = frozenset(),
    salt: bytes = b"",
) -> Draft:
    item = open_item(
        prefix=tuple(tokens), max_new_tokens=1000, eos_token_ids=eos, sampling=sampling, verification=verification
    )
    sequence = Sequence.from_open(item)
    sequence.cache_salt = salt
    return Draft(sequence)


def propose(drafter: SuffixDrafter, draft: Draft, num_tokens: int = 4) -> tuple[int, ...]:
    draft.request(num_tokens)
    assert drafter.step([draft]) == [draft]
    assert draft.num_missing_tokens == 0
    return draft.drafted


def opened(drafter: SuffixDrafter, draft: Draft) -> Draft:
    drafter.open(draft)
    return draft


def write(drafter: SuffixDrafter, prompt: list[int], output: list[int], **kind) -> None:
    """A whole sequence, from open to close."""
    draft = opened(drafter, new_draft(prompt, **kind))
    drafter.commit(draft, draft.commit(tuple(output)))
    drafter.close(draft)


def searched(tokens: list[int], num_tokens: int, policy: SuffixPolicy) -> list[int]:
    """The specification: counts by a search over all positions of the committed tokens."""
    committed, max_context_len = list(tokens), MAX_DEPTH - 1

    def followers(context: list[int]) -> tuple[Counter[int], dict[int, int]]:
        ends = [e for e in range(len(context), len(committed)) if committed[e - len(context) : e] == context]
        return Counter(committed[end] for end in ends), {committed[end]: end for end in ends}

    longest = min(len(tokens), max_context_len)
    match = next((n for n in range(longest, 0, -1) if followers(tokens[len(tokens) - n :])[0]), 0)
    if match < policy.min_match:
        return []
    limit = num_tokens if match == max_context_len else min(num_tokens, int(policy.max_len_factor * match))
    drafted: list[int] = []
    prob = 1.0
    while len(drafted) < limit:
        path = [*tokens[len(tokens) - match :], *drafted][-max_context_len:]
        counts, last = followers(path)
        if not counts:
            break
        best = max(counts, key=lambda token: (counts[token], last[token]))
        prob *= counts[best] / counts.total()
        if prob < policy.min_prob:
            break
        drafted.append(best)
    return drafted


@settings(deadline=None, max_examples=100)
@given(
    TOKENS,
    st.lists(TOKENS, max_size=4),
    st.integers(1, 6),
    st.builds(SuffixPolicy, st.integers(1, 3), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.0, 0.31, 0.5])),
)
def test_proposals_are_what_a_search_over_all_positions_finds(prefix, commits, num_tokens, policy) -> None:
    drafter = SuffixDrafter(policy)
    draft = opened(drafter, new_draft(prefix))
    tokens = list(prefix)
    for commit in [[], *commits]:
        tokens += commit
        drafter.commit(draft, draft.commit(tuple(commit)))
        assert list(propose(drafter, draft, num_tokens)) == searched(tokens, num_tokens, policy)


def test_a_longer_match_is_followed_further() -> None:
    drafter = SuffixDrafter(SuffixPolicy(max_len_factor=1.0))
    short = opened(drafter, new_draft([1, 2, 3, 4, 5, 9, 1]))
    long = opened(drafter, new_draft([1, 2, 3, 4, 5, 9, 1, 2, 3]))
    assert propose(drafter, short, 4) == (2,)
    assert propose(drafter, long, 4) == (4, 5, 9)


def test_a_proposal_ends_where_its_whole_becomes_too_unlikely() -> None:
    tokens = [1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 4, 1, 2, 4, 0, 1]  # 2 always follows 1; then 3 and 4 twice each
    wide, narrow = (
        SuffixDrafter(SuffixPolicy(min_prob=0.2, max_len_factor=9)),
        SuffixDrafter(SuffixPolicy(min_prob=0.6)),
    )
    assert propose(wide, opened(wide, new_draft(tokens)), 4) == (2, 4, 0, 1)
    assert propose(narrow, opened(narrow, new_draft(tokens)), 3) == (2,)


def test_proposal_ends_behind_an_end_of_sequence_token() -> None:
    drafter = SuffixDrafter(SuffixPolicy(max_len_factor=9))
    draft = opened(drafter, new_draft([1, 2, 8, 5, 1, 2], eos=frozenset({8})))
    assert propose(drafter, draft) == (8,)
    assert draft.proposal(1).rows is None


def test_drafted_tokens_are_not_learnt_from() -> None:
    drafter = SuffixDrafter()
    draft = opened(drafter, new_draft([1, 2, 3, 1]))
    assert propose(drafter, draft) == (2, 3)
    drafter.commit(draft, draft.commit((7, 2)))
    assert propose(drafter, draft, 1) == (3,)
    drafter.commit(draft, draft.commit((4, 1)))
    assert propose(drafter, draft, 1) == (7,), "the latest of two that came as often"


@pytest.mark.parametrize("drafter", [SuffixDrafter(), NgramDrafter()], ids=lambda drafter: drafter.kind)
def test_tokens_of_another_draft_are_matched_but_not_learnt_from(drafter) -> None:
    draft = opened(drafter, new_draft([1, 2, 3]))
    draft.sequence.tokens += [1, 9, 1]  # as a staged drafter's model has them, uncommitted
    drafter.commit(draft, 3)
    draft.request(1)
    drafter.step([draft])
    assert draft.sequence.tokens[6:] == [2]


def test_without_a_memory_nothing_is_kept() -> None:
    drafter = SuffixDrafter()
    write(drafter, [9], [1, 2, 3, 4])
    assert propose(drafter, opened(drafter, new_draft([1, 2]))) == ()


def test_a_memory_proposes_what_earlier_sequences_wrote_but_not_what_they_were_asked() -> None:
    drafter = SuffixDrafter(memory=OutputMemory(1000, MAX_DEPTH))
    write(drafter, [5, 6, 7, 8], [1, 2, 3, 4])
    assert propose(drafter, opened(drafter, new_draft([1, 2]))) == (3, 4)
    assert propose(drafter, opened(drafter, new_draft([5, 6]))) == ()


@pytest.mark.parametrize("kind", [{"salt": b"other"}, {"eos": frozenset({77})}], ids=["tenant", "vocabulary"])
def test_other_tenants_and_vocabularies_see_nothing(kind) -> None:
    drafter = SuffixDrafter(memory=OutputMemory(1000, MAX_DEPTH))
    write(drafter, [9], [1, 2, 3, 4])
    assert propose(drafter, opened(drafter, new_draft([1, 2], **kind))) == ()


def test_the_memory_wins_where_it_promises_more() -> None:
    drafter = SuffixDrafter(SuffixPolicy(max_len_factor=1.0), OutputMemory(1000, MAX_DEPTH))
    write(drafter, [9], [1, 2, 3, 4, 5, 6])
    assert propose(drafter, opened(drafter, new_draft([3, 8, 0, 1, 2, 3]))) == (4, 5, 6)
    assert propose(drafter, opened(drafter, new_draft([1, 2, 3, 7, 7, 7, 1, 2, 3]))) == (7, 7, 7), "its own comes first"


@pytest.mark.parametrize(
    ("first", "second", "sees"),
    [
        ((DRAWN, REJECTION), (DRAWN, REJECTION), False),
        ((DRAWN, REJECTION), (SamplingParams(temperature=1.0, seed=6), REJECTION), True),
        ((DRAWN, VerificationMethod.COUPLED), (DRAWN, VerificationMethod.COUPLED), True),
        ((GREEDY, REJECTION), (GREEDY, REJECTION), True),
    ],
)
def test_rejection_never_sees_what_the_same_seed_chose(first, second, sees) -> None:
    """The target's accept noise would be known to the proposal: run once and propose what was rejected or not."""
    drafter = SuffixDrafter(memory=OutputMemory(1000, MAX_DEPTH))
    write(drafter, [9], [1, 2, 3, 4], sampling=first[0], verification=first[1])
    draft = opened(drafter, new_draft([1, 2], sampling=second[0], verification=second[1]))
    assert propose(drafter, draft) == ((3, 4) if sees else ())


def test_a_tree_that_grows_too_large_forgets_the_older_half(monkeypatch) -> None:
    monkeypatch.setattr(suffix, "MAX_SEQUENCE_NODES", 60)
    drafter = SuffixDrafter()
    draft = opened(drafter, new_draft([1, 2, 3]))
    for start in range(10, 200, 10):
        drafter.commit(draft, draft.commit(tuple(range(start, start + 10))))
        assert drafter._indexes[draft].tree.num_nodes <= 60
    drafter.commit(draft, draft.commit((190, 191)))
    assert propose(drafter, draft, 2) == (192, 193)
    drafter.commit(draft, draft.commit((1, 2)))
    assert propose(drafter, draft, 2) == ()


@pytest.mark.parametrize(
    "policy",
    [{"min_match": 0}, {"min_match": MAX_DEPTH}, {"max_len_factor": 0.0}, {"min_prob": 1.1}, {"min_prob": math.nan}],
)
def test_impossible_policies_are_refused(policy) -> None:
    with pytest.raises(ValueError, match=next(iter(policy))):
        SuffixPolicy(**policy)
