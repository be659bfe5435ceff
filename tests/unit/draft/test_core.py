"""The draft's core, one behaviour a test, and a property test against a model whose next token is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Internal, InvalidArgument, OutriderError, ResourceExhausted, Unavailable
from services.common.items import DraftItem, Opened, Proposed, Refused
from services.draft.core import DraftCore
from services.engine.block_manager import BlockManager
from services.engine.drafters.base import Drafter
from services.engine.drafters.model import ModelDrafter
from services.engine.drafters.ngram import NgramDrafter
from services.engine.drafters.simulated import simulated_drafter
from services.engine.step import Sampled, Work
from tests.unit.draft.hash_models import HashDraft, drafted_continuation
from tests.unit.idle_sequences import note_planned
from tests.unit.item_builders import ManualClock, close, identity, open_item, propose, simulated_continuation

PREFIX = (1, 2, 3)


def core_of(drafter: Drafter, *, max_sequences: int = 8, max_sequence_len: int = 200) -> DraftCore:
    return DraftCore(
        drafter,
        max_sequences=max_sequences,
        max_sequence_len=max_sequence_len,
        max_draft_tokens=8,
        clock=ManualClock(),
    )


class EndingDraft(HashDraft):
    """Ends every proposal before the token at index `ends_at`."""

    def __init__(self, blocks: BlockManager, ends_at: int) -> None:
        super().__init__(blocks)
        self._ends_at = ends_at

    def step(self, works: list[Work]) -> list[Sampled | None]:
        found = super().step(works)
        return [None if len(w.sequence) == self._ends_at else s for w, s in zip(works, found, strict=True)]


class Bench:
    """A core over a HashDraft."""

    def __init__(self, *, num_blocks: int = 64, prefill_budget: int = 512, max_sequence_len: int = 200) -> None:
        self.blocks = BlockManager(num_blocks, 4)
        self.model = HashDraft(self.blocks)
        drafter = ModelDrafter(self.model, self.blocks, prefill_budget=prefill_budget)
        self.core = core_of(drafter, max_sequence_len=max_sequence_len)

    def run(self, *items: DraftItem, connection: int = 1) -> list[Opened | Proposed | Refused]:
        return run(self.core, *items, connection=connection)


def run(core: DraftCore, *items: DraftItem, connection: int = 1) -> list[Opened | Proposed | Refused]:
    results = core.handle(connection, items)
    for _ in range(500):
        if not core.has_work:
            break
        results += core.step()
        core.check_integrity()
    assert not core.has_work
    return [result for _, result in results]


def tokens_of(result: Opened | Proposed | Refused) -> tuple[int, ...]:
    assert isinstance(result, Proposed), result
    return result.proposal.token_ids


def error_of(results: list[Opened | Proposed | Refused]) -> OutriderError:
    (error,) = (result.error for result in results if isinstance(result, Refused))
    return error


def test_open_is_answered_once_the_prefix_is_processed() -> None:
    bench = Bench(prefill_budget=10)
    assert bench.core.handle(1, [open_item(prefix=tuple(range(30)))]) == []
    assert [bench.core.step() for _ in range(2)] == [[], []]
    ((_, opened),) = bench.core.step()
    assert isinstance(opened, Opened)
    assert opened.num_cached_tokens == 29


def test_propose_drafts_what_the_model_says() -> None:
    bench = Bench()
    opened, proposed = bench.run(open_item(prefix=PREFIX), propose("a", 3, (), 4))
    assert isinstance(opened, Opened)
    assert isinstance(proposed, Proposed)
    assert proposed.identity == identity("a", base_len=3)
    assert proposed.proposal.proposal_id == 7
    assert proposed.proposal.rows is None
    assert tokens_of(proposed) == drafted_continuation(PREFIX, 4)


def test_after_full_acceptance_the_next_step_feeds_two_tokens() -> None:
    bench = Bench()
    bench.run(open_item(prefix=PREFIX), propose("a", 3, (), 3))
    bench.model.steps.clear()
    committed = (*drafted_continuation(PREFIX, 3), 50)
    (proposed,) = bench.run(propose("a", 7, committed, 2))
    assert bench.model.steps == [[(2, 1)], [(1, 1)]]
    assert tokens_of(proposed) == drafted_continuation(PREFIX + committed, 2)


def test_a_row_that_ends_the_proposal_leaves_the_sequence_usable() -> None:
    blocks = BlockManager(64, 4)
    draft = EndingDraft(blocks, ends_at=6)
    core = core_of(ModelDrafter(draft, blocks))
    opened, proposed = run(core, open_item(prefix=PREFIX), propose("a", 3, (), 5))
    assert isinstance(opened, Opened)
    assert tokens_of(proposed) == drafted_continuation(PREFIX, 3)
    (proposed,) = run(core, propose("a", 6, tokens_of(proposed), 5))
    assert tokens_of(proposed) == ()
    (proposed,) = run(core, propose("a", 7, (9,), 3))
    assert tokens_of(proposed) == drafted_continuation((*PREFIX, *drafted_continuation(PREFIX, 3), 9), 3)
    (proposed,) = run(core, propose("a", 7, (), 2))
    assert tokens_of(proposed) == drafted_continuation((*PREFIX, *drafted_continuation(PREFIX, 3), 9), 2)


def test_after_a_rejection_only_the_targets_own_token_is_computed() -> None:
    bench = Bench()
    bench.run(open_item(prefix=PREFIX), propose("a", 3, (), 4))
    bench.model.steps.clear()
    committed = (*drafted_continuation(PREFIX, 4)[:1], 1)
    (proposed,) = bench.run(propose("a", 5, committed, 1))
    assert bench.model.steps == [[(1, 1)]]
    assert tokens_of(proposed) == drafted_continuation(PREFIX + committed, 1)


def test_commit_that_ends_within_the_draft_is_continued() -> None:
    bench = Bench()
    bench.run(open_item(prefix=PREFIX), propose("a", 3, (), 4))
    committed = drafted_continuation(PREFIX, 2)
    (proposed,) = bench.run(propose("a", 5, committed, 2))
    assert tokens_of(proposed) == drafted_continuation(PREFIX + committed, 2)


def test_sequences_share_every_step_and_join_between_steps() -> None:
    bench = Bench()
    bench.core.handle(1, [open_item("a"), propose("a", 3, (), 3)])
    bench.core.step()
    bench.core.handle(1, [open_item("b"), propose("b", 3, (), 2)])
    bench.run()
    assert [len(step) for step in bench.model.steps] == [1, 2, 2]


def test_zero_draft_tokens_only_take_note() -> None:
    bench = Bench()
    bench.run(open_item(prefix=PREFIX))
    assert bench.run(propose("a", 6, (7, 8, 9), 0)) == []
    (proposed,) = bench.run(propose("a", 7, (10,), 2))
    assert tokens_of(proposed) == drafted_continuation((*PREFIX, 7, 8, 9, 10), 2)


def test_later_commit_overtakes_a_proposal_in_progress() -> None:
    bench = Bench()
    bench.core.handle(1, [open_item(prefix=PREFIX), propose("a", 3, (), 4)])
    bench.core.step()
    results = bench.run(propose("a", 4, (60,), 1))
    assert error_of(results).reason == "STALE"
    assert tokens_of(results[-1]) == drafted_continuation((*PREFIX, 60), 1)


def test_draft_stops_before_the_last_token_of_the_budget() -> None:
    bench = Bench()
    results = bench.run(open_item(prefix=PREFIX, max_new_tokens=3), propose("a", 3, (), 8))
    assert len(tokens_of(results[-1])) == 2
    (proposed,) = bench.run(propose("a", 5, (1, 1), 8))
    assert tokens_of(proposed) == ()


def test_draft_stops_at_the_workers_longest_sequence() -> None:
    bench = Bench(max_sequence_len=6)
    results = bench.run(open_item(prefix=PREFIX, max_new_tokens=50), propose("a", 3, (), 8))
    assert len(tokens_of(results[-1])) == 2


def test_commits_beyond_the_workers_longest_sequence_are_refused() -> None:
    bench = Bench(max_sequence_len=6)
    bench.run(open_item(prefix=PREFIX, max_new_tokens=50), propose("a", 6, (7, 8, 9), 0))
    [refused] = bench.run(propose("a", 7, (10,), 1))
    assert isinstance(refused, Refused)
    assert refused.error.field == "base_len"


def test_commits_beyond_the_budget_are_refused_before_they_outgrow_the_pool() -> None:
    bench = Bench(num_blocks=8)
    other = open_item("b", PREFIX, max_new_tokens=9)
    results = bench.run(open_item(max_new_tokens=10), other, propose("a", 63, (5,) * 60, 3), propose("b", 3, (), 2))
    error = error_of(results)
    assert isinstance(error, InvalidArgument)
    assert (error.field, "13 tokens" in error.message) == ("base_len", True)
    assert tokens_of(results[-1]) == drafted_continuation(PREFIX, 2)


def test_draft_stops_behind_an_end_of_sequence_token() -> None:
    bench = Bench()
    expected = drafted_continuation(PREFIX, 6)
    item = open_item(prefix=PREFIX, eos_token_ids=frozenset({expected[2]}))
    results = bench.run(item, propose("a", 3, (), 6))
    assert tokens_of(results[-1]) == expected[: expected.index(expected[2]) + 1]


def test_ngram_opens_and_proposes_without_blocks() -> None:
    core = core_of(NgramDrafter())
    opened, proposed = run(core, open_item(prefix=(5, 6, 7, 5, 6)), propose("a", 5, (), 2))
    assert isinstance(opened, Opened)
    assert tokens_of(proposed) == (7, 5)
    assert core.load.num_blocks == 0


def test_simulated_drafter_with_full_acceptance_draws_the_targets_tokens() -> None:
    drafter = simulated_drafter(BlockManager(64, 4), acceptance=1.0)
    assert drafter.kind == "simulated"
    results = run(core_of(drafter), open_item(prefix=PREFIX), propose("a", 3, (), 8))
    assert tokens_of(results[-1]) == simulated_continuation(PREFIX, 8)


@pytest.mark.parametrize(
    ("make_item", "reason"),
    [
        (lambda: propose("a", 9, (1,), 1), "STALE"),
        (lambda: propose("a", 3, (), 1, attempt=1), "STALE"),
        (lambda: propose("b", 3, (), 1), "UNKNOWN_SEQUENCE"),
        (lambda: open_item("a", attempt=2), "STALE"),
    ],
)
def test_work_that_does_not_fit_is_refused(make_item: Callable[[], DraftItem], reason: str) -> None:
    bench = Bench()
    bench.run(open_item(attempt=2))
    item = make_item()
    if reason == "STALE" and item.identity.base_len == 9:
        item = propose("a", 9, (1,), 1, attempt=2)
    assert error_of(bench.run(item)).reason == reason


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (propose("a", 4, (257,), 1), "committed_tokens"),
        (propose("a", 3, (), 9), "num_draft_tokens"),
        (open_item("b", (1, 999)), "prefix"),
        (open_item("b", ()), "prefix"),
    ],
)
def test_bad_input_is_refused_naming_the_field(item: DraftItem, field: str) -> None:
    bench = Bench()
    bench.run(open_item())
    error = error_of(bench.run(item))
    assert isinstance(error, InvalidArgument)
    assert error.field == field


def test_refused_propose_changes_nothing() -> None:
    bench = Bench()
    bench.run(open_item(prefix=PREFIX))
    bench.run(propose("a", 4, (257,), 1))
    (proposed,) = bench.run(propose("a", 4, (9,), 2))
    assert tokens_of(proposed) == drafted_continuation((*PREFIX, 9), 2)


def test_newer_open_replaces_and_refuses_what_the_older_was_doing() -> None:
    bench = Bench()
    bench.core.handle(1, [open_item(prefix=tuple(range(30))), propose("a", 30, (), 4)])
    results = bench.core.handle(2, [open_item(attempt=2)])
    assert [(connection, result.error.reason) for connection, result in results if isinstance(result, Refused)] == [
        (1, "STALE"),
        (1, "STALE"),
    ]
    bench.run()
    assert bench.blocks.num_used_blocks == 1


def test_sequence_that_can_never_fit_is_not_worth_a_retry() -> None:
    error = error_of(Bench(num_blocks=4).run(open_item(max_new_tokens=14)))
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.retry_after_ms) == ("TOO_LONG_FOR_POOL", None)


def test_close_and_disconnect_free_all_blocks_without_an_answer() -> None:
    bench = Bench()
    bench.core.handle(1, [open_item("a"), propose("a", 3, (), 8)])
    bench.core.handle(2, [open_item("b"), propose("b", 3, (), 8)])
    bench.core.step()
    assert bench.blocks.num_used_blocks == 2
    assert bench.core.handle(1, [close("a"), close("a")]) == []
    bench.core.disconnect(2)
    assert bench.blocks.num_used_blocks == 0
    assert not bench.core.has_work


def test_abandon_refuses_what_is_in_progress_and_frees_everything() -> None:
    bench = Bench()
    bench.run(open_item("idle"))
    bench.core.handle(1, [open_item("a"), propose("a", 3, (), 8)])
    bench.core.step()
    results = bench.core.abandon(Internal("DEFECT", "x"))
    assert [result.identity.session_id for _, result in results] == ["a"]
    assert bench.core.load.num_sequences == bench.blocks.num_used_blocks == 0


def test_draining_worker_opens_nothing_new() -> None:
    bench = Bench()
    bench.core.drain()
    assert isinstance(error_of(bench.run(open_item())), Unavailable)
    assert bench.core.load.draining


PROMPT = tuple(range(30))


def drafted_by(bench: Bench, session: str, prefix: tuple[int, ...], attempt: int = 1) -> tuple[int, ...]:
    """Opens a sequence and asks for 4 tokens."""
    opened, proposed = bench.run(
        open_item(session, prefix, attempt=attempt), propose(session, len(prefix), (), 4, attempt=attempt)
    )
    assert isinstance(opened, Opened)
    assert opened.num_cached_tokens >= len(prefix) - 1
    return tokens_of(proposed)


@pytest.mark.parametrize("num_tokens", range(26, 31))
def test_second_turn_drafts_the_same_from_the_cache_as_without(num_tokens: int) -> None:
    bench, cold = Bench(), Bench()
    first = PROMPT[:num_tokens]
    drafted_by(bench, "a", first)
    bench.run(propose("a", num_tokens + 2, (70, 71), 3))
    bench.run(close("a", base_len=num_tokens + 2))
    second = (*first, 70, 71, 80, 81)
    assert drafted_by(bench, "a", second, 2) == drafted_by(cold, "a", second) == drafted_continuation(second, 4)
    assert bench.core.prefix_cache_stats.num_hit_tokens == (num_tokens + 1) // 4 * 4


def test_prefill_of_a_cached_prefix_computes_what_is_new() -> None:
    bench = Bench()
    drafted_by(bench, "a", PROMPT)
    bench.model.steps.clear()
    drafted_by(bench, "b", (*PROMPT, 5, 6, 7))
    assert bench.model.steps[0] == [(33 - 28, 1)]


def test_drafted_tokens_are_never_found() -> None:
    bench = Bench()
    drafted = drafted_by(bench, "a", PROMPT)
    bench.run(propose("a", 30, (), 8))
    bench.run(close("a", base_len=30))
    drafted_by(bench, "b", (*PROMPT, *drafted, 1, 2))
    assert bench.core.prefix_cache_stats.num_hit_tokens == 28


def test_lost_stream_leaves_the_committed_prefix_cached() -> None:
    bench = Bench()
    drafted_by(bench, "a", PROMPT)
    bench.run(propose("a", 36, (1, 2, 3, 4, 5, 6), 2))
    bench.core.disconnect(1)
    assert bench.blocks.num_used_blocks == 0
    drafted_by(bench, "a", (*PROMPT, 1, 2, 3, 4, 5, 6), 2)
    assert bench.core.prefix_cache_stats.num_hit_tokens == 32


def test_what_was_accepted_last_is_found_though_no_step_came_after_it() -> None:
    bench = Bench()
    bench.run(open_item("a", PROMPT), propose("a", 30, (), 8))
    drafted = drafted_continuation(PROMPT, 8)
    bench.core.handle(1, [propose("a", 38, drafted, 0), close("a", base_len=38)])
    drafted_by(bench, "b", (*PROMPT, *drafted, 1, 2))
    assert bench.core.prefix_cache_stats.num_hit_tokens == 36


def test_opening_a_cached_prefix_is_answered() -> None:
    for num_tokens in range(1, 31):
        bench = Bench()
        bench.run(open_item("a", PROMPT))
        bench.run(close("a", base_len=30))
        (opened,) = bench.run(open_item("b", PROMPT[:num_tokens]))
        assert isinstance(opened, Opened)
        assert opened.num_cached_tokens == num_tokens - 1


def accepted_lens(core: DraftCore, session: str, prefix: tuple[int, ...], attempt: int) -> list[int]:
    """Accepted draft tokens of each of 40 rounds, by the simulated target's own tokens."""
    expected, done, committed, lens = simulated_continuation(prefix, 250), 0, (), []
    results = run(core, open_item(session, prefix, attempt=attempt, max_new_tokens=400))
    for _ in range(40):
        base_len = len(prefix) + done
        results = run(core, propose(session, base_len, committed, 4, attempt=attempt))
        drafted = tokens_of(results[-1])
        num = next((n for n, token in enumerate(drafted) if token != expected[done + n]), len(drafted))
        lens.append(num)
        committed = expected[done : done + num + 1]
        done += num + 1
    return lens


def test_acceptance_after_a_cache_hit_is_that_after_a_cold_prefill() -> None:
    blocks = BlockManager(256, 4)
    core = core_of(simulated_drafter(blocks, acceptance=0.7, seed=3), max_sequence_len=600)
    cold = accepted_lens(core, "a", PROMPT, 1)
    run(core, close("a", base_len=0))
    assert accepted_lens(core, "a", PROMPT, 2) == cold
    assert core.prefix_cache_stats.num_hit_tokens == 28
    assert 60 < sum(cold) < 110


ROUNDS = st.lists(
    st.tuples(
        st.integers(0, 2),  # session
        st.integers(0, 5),  # draft tokens asked for; 0 takes note
        st.integers(0, 5),  # of the last proposal: tokens accepted
        st.integers(0, 3),  # tokens of the target's own
        st.integers(0, 4),  # steps before the next round, which may overtake this one
    ),
    max_size=25,
)
REOPENED = 4
"""With as many steps before the next round, the session is first closed and opened again, or its stream lost."""


@settings(deadline=None, max_examples=150)
@given(ROUNDS, st.integers(18, 40), st.integers(2, 30))
def test_proposals_continue_the_commits_whatever_happens(
    rounds: list[tuple[int, int, int, int, int]], num_blocks: int, prefill_budget: int
) -> None:
    bench = Bench(num_blocks=num_blocks, prefill_budget=prefill_budget)
    committed = {str(n): tuple(range(1, 2 + 11 * max(1, n))) for n in range(3)}
    attempts = dict.fromkeys(committed, 1)
    asked: dict[str, tuple[tuple[int, ...], int]] = {}
    last: dict[str, tuple[int, ...]] = {}

    def take(results: list[tuple[int, Opened | Proposed | Refused]]) -> None:
        for _, result in results:
            name = result.identity.session_id
            if isinstance(result, Proposed):
                base, num_tokens = asked.pop(name)
                assert result.identity.base_len == len(base)
                last[name] = result.proposal.token_ids
                assert last[name] == drafted_continuation(base, num_tokens)
            elif isinstance(result, Refused):
                assert result.error.reason == "STALE"

    def open_again(names: list[str]) -> None:
        for name in names:
            attempts[name] += 1
            tokens = committed[name]
            item = open_item(name, tokens, attempt=attempts[name], max_new_tokens=70 - len(tokens))
            take(bench.core.handle(1, [item]))
            asked.pop(name, None)
            last.pop(name, None)

    open_again(list(committed))
    for which, num_draft, num_accepted, num_own, num_steps in rounds:
        name = str(which)
        new = last.pop(name, ())[:num_accepted] + (70, 71, 72)[:num_own]
        if len(committed[name]) + len(new) + num_draft >= 60:
            continue
        committed[name] += new
        asked.pop(name, None)
        if num_draft:
            asked[name] = (committed[name], num_draft)
        take(bench.core.handle(1, [propose(name, len(committed[name]), new, num_draft, attempt=attempts[name])]))
        for _ in range(num_steps):
            if bench.core.has_work:
                take(bench.core.step())
            bench.core.check_integrity()
        if num_steps == REOPENED and num_own % 2:
            bench.core.disconnect(1)
            open_again(list(committed))
        elif num_steps == REOPENED:
            take(bench.core.handle(1, [close(name, attempt=attempts[name], base_len=len(committed[name]))]))
            open_again([name])
    for _ in range(300):
        if not bench.core.has_work:
            break
        take(bench.core.step())
        bench.core.check_integrity()
    assert not bench.core.has_work
    assert asked == {}
    bench.core.disconnect(1)
    assert bench.blocks.num_used_blocks == 0


def test_idle_sequences_are_not_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.run(*[open_item(session) for session in "abcd"])
    planned = note_planned(monkeypatch)
    bench.run(propose("b", 3, (), 4))
    assert planned == [(1, 4)] * 4
