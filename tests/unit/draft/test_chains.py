"""Chains and staged drafters through the draft's core, against models whose next token is known."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Internal, OutriderError
from services.common.items import DraftItem, Opened, Proposed
from services.draft.core import DraftCore
from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Drafter
from services.engine.drafters.fallback import FallbackDrafter
from services.engine.drafters.model import ModelDrafter
from services.engine.drafters.ngram import NgramDrafter
from services.engine.drafters.staged import StagedDrafter
from services.engine.drafters.suffix import SuffixDrafter, SuffixPolicy
from services.engine.scheduler import MAX_ROUND_LEN
from services.engine.step import Verdict, Work
from tests.unit.draft.hash_models import HashDraft, HashVerifier, drafted_continuation
from tests.unit.item_builders import ManualClock, close, open_item, propose

PREFIX = (1, 2, 3)
LOOP = (5, 6, 7, 5, 6)
MATCH_LEN = 2


class Bench:
    """A core over a drafter, checked for integrity after every step."""

    def __init__(self, drafter: Drafter) -> None:
        self.core = DraftCore(drafter, max_sequences=8, max_sequence_len=200, max_draft_tokens=8, clock=ManualClock())

    def run(self, *items: DraftItem) -> list[tuple[int, ...]]:
        """Takes items and steps until nothing is left; returns the proposals' tokens."""
        results = self.core.handle(1, items)
        for _ in range(2_000):
            if not self.core.has_work:
                break
            results += self.core.step()
            self.core.check_integrity()
        assert not self.core.has_work
        assert all(isinstance(result, Opened | Proposed) for _, result in results), results
        return [result.proposal.token_ids for _, result in results if isinstance(result, Proposed)]


class Chain(Bench):
    """ngram, then a model."""

    def __init__(self, num_blocks: int = 64) -> None:
        self.blocks = BlockManager(num_blocks, 4)
        self.model = HashDraft(self.blocks)
        last = ModelDrafter(self.model, self.blocks)
        super().__init__(FallbackDrafter([NgramDrafter(ngram_min=MATCH_LEN)], last))


class Staged(Bench):
    """A smaller drafter before a model of the same function."""

    def __init__(self, kind: str, num_blocks: int = 64, num_draft_tokens: int = 3) -> None:
        self.blocks, self.smaller_blocks = BlockManager(num_blocks, 4), BlockManager(num_blocks, 4)
        self.model = HashVerifier(self.blocks)
        self.drafter = StagedDrafter(
            self._smaller(kind), self.model, self.blocks, num_draft_tokens=num_draft_tokens, clock=ManualClock()
        )
        super().__init__(self.drafter)

    def _smaller(self, kind: str) -> Drafter:
        match kind:
            case "ngram":
                return NgramDrafter()
            case "suffix":
                return SuffixDrafter(SuffixPolicy(max_len_factor=4))
        errs_every = {"good": 0, "fair": 3, "useless": 1}[kind]
        self.smaller = HashDraft(self.smaller_blocks, errs_every)
        return ModelDrafter(self.smaller, self.smaller_blocks)


def looked_up(tokens: tuple[int, ...], num_tokens: int) -> tuple[int, ...] | None:
    """What the chain's n-grams find, by a search."""
    for num in range(min(4, len(tokens)), MATCH_LEN - 1, -1):
        for end in range(len(tokens) - 1, num - 1, -1):
            if tokens[end - num : end] == tokens[len(tokens) - num :]:
                copied = list(tokens)
                for index in range(num_tokens):
                    copied.append(copied[end + index])
                return tuple(copied[len(tokens) :])
    return None


def test_the_first_drafter_with_a_match_proposes_and_the_model_computes_nothing() -> None:
    chain = Chain()
    chain.run(open_item(prefix=LOOP))
    chain.model.steps.clear()
    assert chain.run(propose("a", 5, (), 4)) == [(7, 5, 6, 7)]
    assert chain.run(propose("a", 8, (7, 5, 6), 4)) == [(7, 5, 6, 7)]
    assert chain.model.steps == []


def test_the_model_proposes_where_no_lookup_matches() -> None:
    chain = Chain()
    assert chain.run(open_item(prefix=PREFIX), propose("a", 3, (), 4)) == [drafted_continuation(PREFIX, 4)]


def test_a_model_that_was_not_asked_catches_up_in_the_step_of_its_first_token() -> None:
    chain = Chain()
    chain.run(open_item(prefix=LOOP))
    tokens = LOOP
    for _ in range(4):
        chain.run(propose("a", len(tokens) + 3, (7, 5, 6), 4))
        tokens += (7, 5, 6)
    chain.model.steps.clear()
    tokens += (9,)
    assert chain.run(propose("a", len(tokens), (9,), 2)) == [drafted_continuation(tokens, 2)]
    assert chain.model.steps == [[(4 * 3 + 2, 1)], [(1, 1)]], "the prompt's last token, the commits, the new one"


def test_a_model_that_falls_far_behind_catches_up_in_an_idle_step() -> None:
    chain = Chain()
    chain.run(open_item(prefix=LOOP))
    chain.model.steps.clear()
    commit = (7, 5, 6) * 6
    assert chain.run(propose("a", 5 + len(commit), commit, 4)) == [(7, 5, 6, 7)]
    assert chain.model.steps == [[(1 + len(commit) + 3, 0)]], "all that lacks but the last token"
    assert len(commit) > MAX_ROUND_LEN


def test_an_open_is_answered_although_a_lookup_proposed_before_the_prefix_was_processed() -> None:
    chain = Chain()
    results = chain.core.handle(1, [open_item(prefix=LOOP), propose("a", 5, (), 3)])
    while chain.core.has_work:
        results += chain.core.step()
    assert sorted(type(result).__name__ for _, result in results) == ["Opened", "Proposed"]


def test_a_commit_decides_anew_who_proposes() -> None:
    chain = Chain()
    chain.core.handle(1, [open_item(prefix=PREFIX), propose("a", 3, (), 4)])
    chain.core.step()
    proposals = chain.core.handle(1, [propose("a", 5, (2, 3), 4)])
    while chain.core.has_work:
        proposals += chain.core.step()
    assert proposals[-1][1].proposal.token_ids == (2, 3, 2, 3)


def test_a_chain_is_named_by_its_stages_and_has_the_last_ones_pool() -> None:
    blocks = BlockManager(4, 4)
    chain = FallbackDrafter([SuffixDrafter(), NgramDrafter()], ModelDrafter(HashDraft(blocks), blocks))
    assert (chain.kind, chain.blocks, chain.info) == ("suffix,ngram,model", blocks, HashDraft(blocks).info)
    with pytest.raises(ValueError, match="at least two"):
        FallbackDrafter([], NgramDrafter())


@pytest.mark.parametrize("kind", ["ngram", "suffix", "good", "fair", "useless"])
def test_a_staged_proposal_is_the_models_own_whoever_drafts_for_it(kind: str) -> None:
    staged = Staged(kind)
    assert staged.run(open_item(prefix=PREFIX), propose("a", 3, (), 8)) == [drafted_continuation(PREFIX, 8)]


@pytest.mark.parametrize(("kind", "num_steps"), [("good", 2), ("useless", 8)])
def test_a_good_smaller_drafter_saves_the_models_steps(kind: str, num_steps: int) -> None:
    staged = Staged(kind, num_draft_tokens=3)
    staged.run(open_item(prefix=PREFIX))
    staged.model.num_steps = 0
    staged.run(propose("a", 3, (), 8))
    assert staged.model.num_steps == num_steps


def test_a_staged_proposal_stops_behind_an_end_of_sequence_token() -> None:
    expected = drafted_continuation(PREFIX, 6)
    item = open_item(prefix=PREFIX, eos_token_ids=frozenset({expected[2]}))
    assert Staged("good").run(item, propose("a", 3, (), 6)) == [expected[: expected.index(expected[2]) + 1]]


def test_sequences_are_verified_together() -> None:
    staged = Staged("good", num_draft_tokens=3)
    staged.run(open_item("a"), open_item("b"))
    staged.model.num_steps = 0
    expected = drafted_continuation(PREFIX, 4)
    assert staged.run(propose("a", 3, (), 4), propose("b", 3, (), 4)) == [expected, expected]
    assert staged.model.num_steps == 1


def test_both_pools_are_free_when_the_sequences_are_gone() -> None:
    staged = Staged("fair")
    staged.core.handle(1, [open_item("a", tuple(range(20))), propose("a", 20, (), 8), open_item("b")])
    for _ in range(3):
        staged.core.step()
    staged.core.handle(1, [close("a")])
    staged.core.abandon(Internal("DEFECT", "x"))
    staged.core.check_integrity()
    for blocks in (staged.blocks, staged.smaller_blocks):
        assert blocks.num_used_blocks == 0
        assert len(blocks._free) == blocks.num_blocks, "nothing stays cached"


class FailingVerifier(HashVerifier):
    """Fails where it has a row, once `fails` is set, and clears what the sequence does not share."""

    fails = False

    def step(self, works: list[Work]) -> list[Verdict | OutriderError | None]:
        verdicts = super().step(works)
        if not self.fails:
            return verdicts
        for work in [work for work in works if work.num_rows]:
            for block in work.sequence.block_table[work.sequence.num_shared_blocks :]:
                self._cache._states[block * 4 : block * 4 + 4] = array("Q", bytes(32))
        return [Internal("DEFECT", "not finite") if work.num_rows else None for work in works]


def test_what_a_failed_row_of_the_staged_model_cleared_is_computed_again_before_it_is_shared() -> None:
    staged = Staged("good")
    staged.drafter._model = model = FailingVerifier(staged.blocks)
    prefix, model.fails = tuple(range(1, 14)), True
    assert staged.run(open_item(prefix=prefix), propose("a", 13, (), 4)) == [()]
    model.fails = False
    assert staged.run(propose("a", 13, (), 4)) == [drafted_continuation(prefix, 4)]
    longer = (*prefix, 5)
    assert staged.run(open_item("b", longer), propose("b", 14, (), 4)) == [drafted_continuation(longer, 4)]
    assert staged.blocks.prefix_cache_stats.num_hit_tokens == 12


ROUNDS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 9), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 6)
    ),
    max_size=12,
)
"""Session, how much of its proposal is accepted, what the target says then, draft tokens asked for."""
PREFIXES = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=60), min_size=3, max_size=3)


def check_rounds(bench: Bench, prefixes: list[list[int]], rounds, expected) -> None:
    """Sessions that go on by turns; every proposal is what `expected` says of all tokens before."""
    tokens = {str(number): tuple(prefix) for number, prefix in enumerate(prefixes)}
    proposals = dict.fromkeys(tokens, ())
    bench.run(*(open_item(session, prefix, max_new_tokens=122) for session, prefix in tokens.items()))
    for number, num_accepted, own, num_asked in rounds:
        session = str(number)
        commit = (*proposals[session][:num_accepted], *own)
        tokens[session] += commit
        answers = bench.run(propose(session, len(tokens[session]), commit, num_asked))
        assert len(answers) == (num_asked > 0)
        proposals[session] = answers[0] if answers else ()
        if answers:
            assert answers[0] == expected(tokens[session], num_asked)
    bench.run(*(close(session, base_len=len(tokens[session])) for session in tokens))
    bench.core.check_integrity()


@settings(deadline=None, max_examples=60)
@given(PREFIXES, ROUNDS, st.sampled_from([46, 128]))
def test_a_chain_proposes_what_lookup_or_model_would_whatever_came_before(prefixes, rounds, num_blocks) -> None:
    def expected(tokens: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        found = looked_up(tokens, num_tokens)
        return drafted_continuation(tokens, num_tokens) if found is None else found

    check_rounds(Chain(num_blocks), prefixes, rounds, expected)


@settings(deadline=None, max_examples=60)
@given(PREFIXES, ROUNDS, st.sampled_from(["ngram", "suffix", "good", "fair"]), st.sampled_from([46, 128]))
def test_a_staged_drafter_proposes_what_its_model_would_whatever_came_before(
    prefixes, rounds, kind, num_blocks
) -> None:
    staged = Staged(kind, num_blocks)

    def expected(tokens: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        for draft, inner in staged.drafter._inners.items():
            assert inner.draft.sequence.num_committed == draft.sequence.num_committed
            committed = draft.sequence.tokens[: draft.sequence.num_committed]
            assert inner.draft.sequence.tokens[: len(committed)] == committed
        return drafted_continuation(tokens, num_tokens)

    check_rounds(staged, prefixes, rounds, expected)
