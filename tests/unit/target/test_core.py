"""The target's core, one behaviour a test, and a property test against the deterministic continuation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Aborted, Internal, InvalidArgument, OutriderError, ResourceExhausted, Unavailable
from services.common.items import Refused, TargetItem, Tokens
from services.common.values import Proposal, SamplingParams, SparseRow
from services.common.vocab import SIMULATED_EOS
from services.engine.block_manager import BlockManager
from services.engine.scheduler import MIN_PREFILL_BUDGET
from services.engine.sequence_table import FENCE_TTL_NS
from services.engine.simulated import SimulatedTarget
from services.engine.step import Verdict, Work
from services.target.core import TargetCore
from tests.unit.idle_sequences import note_planned
from tests.unit.item_builders import (
    ManualClock,
    close,
    decode,
    identity,
    open_item,
    simulated_continuation,
    verify,
)

PREFIX = (1, 2, 3)


def new_core(
    *,
    num_blocks: int = 64,
    max_sequences: int = 8,
    prefill_budget: int = 512,
    eos_probability: float = 0.0,
    clock: ManualClock | None = None,
) -> TargetCore:
    blocks = BlockManager(num_blocks, 4)
    return TargetCore(
        SimulatedTarget(blocks, eos_probability=eos_probability),
        blocks,
        max_sequences=max_sequences,
        max_sequence_len=200,
        max_draft_tokens=8,
        prefill_budget=prefill_budget,
        clock=clock or ManualClock(),
    )


def run(core: TargetCore, *items: TargetItem, connection: int = 1) -> list[Tokens | Refused]:
    """Hands items over and steps until there is no more to do; all results."""
    results = core.handle(connection, items)
    for _ in range(500):
        if not core.has_work:
            break
        results += core.step()
        core.check_integrity()
    assert not core.has_work
    return [result for _, result in results]


def tokens_of(result: Tokens | Refused) -> Tokens:
    assert isinstance(result, Tokens), result
    return result


def error_of(results: list[Tokens | Refused]) -> OutriderError:
    (result,) = results
    assert isinstance(result, Refused)
    return result.error


def test_open_alone_is_not_answered_but_prefills_all_but_the_last_token() -> None:
    core = new_core()
    assert run(core, open_item(prefix=tuple(range(20)))) == []
    (result,) = run(core, verify("a", 20, ()))
    assert tokens_of(result).step_rows == 1


def test_verify_accepts_the_equal_prefix_and_adds_the_targets_own() -> None:
    core = new_core()
    expected = simulated_continuation(PREFIX, 4)
    wrong = expected[2] ^ 1
    (result,) = run(core, open_item(prefix=PREFIX), verify("a", 3, (*expected[:2], wrong, 9)))
    tokens = tokens_of(result)
    assert tokens.token_ids == expected[:3]
    assert (tokens.num_accepted_tokens, tokens.num_draft_tokens, tokens.done) == (2, 4, True)
    assert tokens.num_cached_tokens == 5
    assert tokens.identity == identity("a", base_len=3)


def test_all_accepted_brings_a_bonus_token() -> None:
    core = new_core()
    expected = simulated_continuation(PREFIX, 5)
    (result,) = run(core, open_item(prefix=PREFIX), verify("a", 3, expected[:4]))
    assert tokens_of(result).token_ids == expected


class FailingTarget(SimulatedTarget):
    """A target whose works all fail once `fails` is set."""

    fails = False

    def step(self, works: list[Work]) -> list[Verdict | OutriderError | None]:
        return [Internal("DEFECT", "not finite")] * len(works) if self.fails else super().step(works)


def test_a_prefill_that_failed_while_nobody_waited_is_told_to_the_next_item() -> None:
    blocks = BlockManager(64, 4)
    model = FailingTarget(blocks)
    core = TargetCore(model, blocks, max_sequences=8, max_sequence_len=200, max_draft_tokens=8, clock=ManualClock())
    model.fails = True
    prefix = tuple(range(1, 21))
    assert run(core, open_item(prefix=prefix)) == []
    assert blocks.num_free_blocks == 64
    model.fails = False
    assert error_of(run(core, verify("a", 20, (1,)))).reason == "DEFECT"
    assert error_of(run(core, verify("a", 20, (1,)))).reason == "UNKNOWN_SEQUENCE"
    (result,) = run(core, open_item(prefix=prefix, attempt=2), decode("a", 20, 1, attempt=2))
    assert tokens_of(result).token_ids == simulated_continuation(prefix, 1)
    assert core.prefix_cache_stats.num_hit_tokens == 0


def test_nothing_that_was_not_shared_before_is_shared_by_a_sequence_that_failed() -> None:
    blocks = BlockManager(64, 4)
    model = FailingTarget(blocks)
    core = TargetCore(model, blocks, max_sequences=8, max_sequence_len=200, max_draft_tokens=8, clock=ManualClock())
    expected = simulated_continuation(PREFIX, 9)
    run(core, open_item(prefix=PREFIX), verify("a", 3, expected[:8]))
    model.fails = True
    assert error_of(run(core, verify("a", 12, ()))).reason == "DEFECT"
    model.fails = False
    (result,) = run(core, open_item("b", prefix=(*PREFIX, *expected)), decode("b", 12, 1))
    assert tokens_of(result).token_ids == simulated_continuation((*PREFIX, *expected), 1)
    assert core.prefix_cache_stats.num_hit_tokens == 0


def test_rounds_continue_where_the_last_one_ended() -> None:
    core = new_core()
    expected = simulated_continuation(PREFIX, 6)
    run(core, open_item(prefix=PREFIX), verify("a", 3, (expected[0], 0)))
    (result,) = run(core, verify("a", 5, expected[2:5]))
    assert tokens_of(result).token_ids == expected[2:6]


def test_decode_streams_tokens_one_by_one_and_only_the_last_is_done() -> None:
    results = [tokens_of(result) for result in run(new_core(), open_item(prefix=PREFIX), decode("a", 3, 5))]
    assert tuple(token for result in results for token in result.token_ids) == simulated_continuation(PREFIX, 5)
    assert [result.done for result in results] == [False] * 4 + [True]
    assert [result.identity.base_len for result in results] == [3, 4, 5, 6, 7]


def test_decode_ends_at_the_budget() -> None:
    results = run(new_core(), open_item(prefix=PREFIX, max_new_tokens=2), decode("a", 3, 50))
    assert [tokens_of(result).done for result in results] == [False, True]


def test_decode_ends_at_end_of_sequence() -> None:
    expected = simulated_continuation(PREFIX, 100, eos_probability=0.2)
    assert expected[-1] == SIMULATED_EOS
    results = run(new_core(eos_probability=0.2), open_item(prefix=PREFIX), decode("a", 3, 100))
    assert tuple(tokens_of(result).token_ids[0] for result in results) == expected
    assert tokens_of(results[-1]).done


def test_accepted_end_of_sequence_ends_the_verdict() -> None:
    expected = simulated_continuation(PREFIX, 100, eos_probability=0.2)[-6:]
    prefix = (*PREFIX, *simulated_continuation(PREFIX, 100, eos_probability=0.2)[:-6])
    core = new_core(eos_probability=0.2)
    (result,) = run(core, open_item(prefix=prefix), verify("a", len(prefix), (*expected, 50, 51)))
    assert tokens_of(result).token_ids == expected
    assert tokens_of(result).num_accepted_tokens == len(expected)


def test_sequence_goes_on_behind_an_accepted_end_of_sequence_if_asked_to() -> None:
    core, eos = new_core(), simulated_continuation(PREFIX, 2)[1]
    item = open_item(prefix=PREFIX, eos_token_ids=frozenset({eos}))
    (ended,) = run(core, item, verify("a", 3, simulated_continuation(PREFIX, 5)))
    assert tokens_of(ended).token_ids == simulated_continuation(PREFIX, 2)
    (result,) = run(core, verify("a", 5, ()))
    assert tokens_of(result).token_ids == simulated_continuation(PREFIX, 3)[2:]


def test_draft_tokens_beyond_the_budget_are_dropped() -> None:
    expected = simulated_continuation(PREFIX, 5)
    (result,) = run(new_core(), open_item(prefix=PREFIX, max_new_tokens=2), verify("a", 3, expected))
    assert tokens_of(result).token_ids == expected[:2]
    assert tokens_of(result).num_draft_tokens == 2


def test_interrupt_ends_a_running_decode_without_tokens() -> None:
    core = new_core()
    core.handle(1, [open_item(prefix=PREFIX), decode("a", 3, 50)])
    core.step()
    ((connection, result),) = core.handle(1, [decode("a", 4, 0)])
    assert connection == 1
    assert (tokens_of(result).token_ids, tokens_of(result).done) == ((), True)
    assert tokens_of(result).identity.base_len == 4
    assert not core.has_work
    (after,) = run(core, verify("a", 4, ()))
    assert tokens_of(after).token_ids == simulated_continuation(PREFIX, 2)[1:]


def test_interrupt_of_a_finished_decode_is_ignored() -> None:
    core = new_core()
    run(core, open_item(prefix=PREFIX), decode("a", 3, 1))
    assert core.handle(1, [decode("a", 3, 0), decode("zzz", 3, 0)]) == []


def test_interrupt_leaves_a_verify_alone() -> None:
    results = run(new_core(), open_item(prefix=PREFIX), verify("a", 3, ()), decode("a", 3, 0))
    assert [len(tokens_of(result).token_ids) for result in results] == [1]


def test_sequences_share_a_step() -> None:
    core = new_core()
    core.handle(1, [open_item("a"), open_item("b"), verify("a", 3, (5, 6)), decode("b", 3, 1)])
    results = [tokens_of(result) for _, result in core.step()]
    assert [result.step_rows for result in results] == [4, 4]


def test_long_prefix_is_prefilled_in_chunks_beside_running_rows() -> None:
    core = new_core(prefill_budget=10)
    core.handle(1, [open_item("a", PREFIX), decode("a", 3, 50)])
    core.step()
    core.handle(1, [open_item("b", tuple(range(45))), decode("b", 45, 1)])
    sessions = [[result.identity.session_id for _, result in core.step()]]
    while sessions[-1] == ["a"]:
        sessions.append([result.identity.session_id for _, result in core.step()])
    assert sessions[-1] == ["a", "b"]
    assert 45 / 10 <= len(sessions) <= 45 / MIN_PREFILL_BUDGET


def test_timings_tell_queueing_from_computing() -> None:
    clock = ManualClock()
    core = new_core(clock=clock)
    core.handle(1, [open_item(), decode("a", 3, 2)], arrived_ns=-500)
    first, second = (tokens_of(core.step()[0][1]) for _ in range(2))
    assert (first.timings.queue_ns, first.timings.forward_ns, first.timings.total_ns) == (500, 0, 500)
    assert second.timings.queue_ns == 0


def test_newer_open_replaces_and_refuses_what_the_older_was_doing() -> None:
    core = new_core()
    core.handle(1, [open_item(prefix=PREFIX), decode("a", 3, 50)])
    results = core.handle(2, [open_item(prefix=(7, 8), attempt=2)])
    ((connection, refused),) = results
    assert connection == 1
    assert error_of([refused]).reason == "STALE"
    (result,) = run(core, verify("a", 2, (), attempt=2), connection=2)
    assert tokens_of(result).token_ids == simulated_continuation((7, 8), 1)


@pytest.mark.parametrize("attempt", [1, 2])
def test_open_that_is_not_newer_is_stale(attempt: int) -> None:
    core = new_core()
    run(core, open_item(attempt=2))
    assert error_of(run(core, open_item(attempt=attempt))).reason == "STALE"


def test_closed_session_stays_fenced_for_ten_minutes() -> None:
    clock = ManualClock()
    core = new_core(clock=clock)
    run(core, open_item(attempt=2), close("a", attempt=2))
    clock.now_ns += FENCE_TTL_NS - 1
    assert error_of(run(core, open_item(attempt=1))).reason == "STALE"
    clock.now_ns += 1
    assert run(core, open_item(attempt=1)) == []


def test_item_of_an_older_attempt_is_stale() -> None:
    core = new_core()
    run(core, open_item(attempt=2))
    error = error_of(run(core, verify("a", 3, (), attempt=1)))
    assert isinstance(error, Aborted)
    assert error.reason == "STALE"


def test_item_on_other_tokens_is_stale() -> None:
    core = new_core()
    assert error_of(run(core, open_item(), verify("a", 4, ()))).reason == "STALE"


@pytest.mark.parametrize(("session", "attempt", "connection"), [("b", 1, 1), ("a", 2, 1), ("a", 1, 2)])
def test_item_without_its_sequence_is_told_so(session: str, attempt: int, connection: int) -> None:
    core = new_core()
    run(core, open_item())
    error = error_of(run(core, verify(session, 3, (), attempt=attempt), connection=connection))
    assert error.reason == "UNKNOWN_SEQUENCE"


def test_second_item_while_one_is_in_progress_is_refused() -> None:
    core = new_core()
    core.handle(1, [open_item(), decode("a", 3, 5)])
    ((_, result),) = core.handle(1, [verify("a", 3, ())])
    assert error_of([result]).reason == "SESSION_BUSY"


def test_sequence_without_budget_is_told_so() -> None:
    core = new_core()
    run(core, open_item(max_new_tokens=1), decode("a", 3, 1))
    error = error_of(run(core, decode("a", 4, 1)))
    assert isinstance(error, InvalidArgument)
    assert error.field == "max_new_tokens"


@pytest.mark.parametrize(
    ("items", "field", "limit"),
    [
        ([open_item(prefix=())], "prefix", "at least one"),
        ([open_item(prefix=(1, 257))], "prefix", "257"),
        ([open_item(prefix=(1, -1))], "prefix", "257"),
        ([open_item(prefix=(1,) * 200)], "prefix", "199"),
        ([open_item(max_new_tokens=0)], "max_new_tokens", "at least 1"),
        ([open_item(max_new_tokens=198)], "max_new_tokens", "200"),
        ([open_item(), verify("a", 3, (257,))], "proposal.token_ids", "257"),
        ([open_item(), verify("a", 3, (1,) * 9)], "proposal.token_ids", "at most 8"),
        ([open_item(), decode("a", 3, -1)], "num_free_tokens", "below 0"),
        ([replace(open_item(), num_top_log_probs=21)], "num_top_log_probs", "[0, 20]"),
        ([open_item(sampling=SamplingParams(temperature=nan))], "sampling.temperature", "[0, 100]"),
        ([open_item(sampling=SamplingParams(top_p=0.0))], "sampling.top_p", "(0, 1]"),
        ([open_item(sampling=SamplingParams(min_p=2.0))], "sampling.min_p", "[0, 1]"),
        ([open_item(sampling=SamplingParams(repetition_penalty=nan))], "sampling.repetition_penalty", "(0, 10]"),
        ([open_item(sampling=SamplingParams(presence_penalty=inf))], "sampling.presence_penalty", "[-2, 2]"),
        ([open_item(sampling=SamplingParams(frequency_penalty=-inf))], "sampling.frequency_penalty", "[-2, 2]"),
        ([open_item(sampling=SamplingParams(logit_bias=((3, inf),)))], "sampling.logit_bias[3]", "[-100, 100]"),
    ],
)
def test_bad_input_is_refused_naming_field_and_limit(items: list[TargetItem], field: str, limit: str) -> None:
    core = new_core()
    error = error_of(run(core, *items))
    assert isinstance(error, InvalidArgument)
    assert error.field == field
    assert limit in error.message


def test_rows_that_do_not_match_the_tokens_are_refused() -> None:
    item = verify("a", 3, (4, 5))
    item = type(item)(item.identity, Proposal(1, (4, 5), (SparseRow((4,), (1.0,)),)))
    assert error_of(run(new_core(), open_item(), item)).field == "proposal.rows"


def test_too_many_sequences_are_worth_a_retry() -> None:
    error = error_of(run(new_core(max_sequences=1), open_item("a"), open_item("b")))
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "QUEUE_FULL"
    assert error.retry_after_ms


def test_sequence_that_can_never_fit_is_not_worth_a_retry() -> None:
    error = error_of(run(new_core(num_blocks=4), open_item(max_new_tokens=14)))
    assert error.reason == "TOO_LONG_FOR_POOL"
    assert error.retry_after_ms is None


def test_close_and_disconnect_free_all_blocks_without_an_answer() -> None:
    core = new_core()
    core.handle(1, [open_item("a"), decode("a", 3, 50)])
    core.handle(2, [open_item("b"), decode("b", 3, 50)])
    core.step()
    assert core.load.num_used_blocks == 2
    assert core.handle(1, [close("a"), close("a"), close("never")]) == []
    core.disconnect(2)
    assert core.load.num_used_blocks == 0
    assert not core.has_work


def test_disconnect_leaves_other_connections_alone() -> None:
    core = new_core()
    core.handle(1, [open_item("a"), decode("a", 3, 2)])
    core.disconnect(2)
    assert len(run(core)) == 2


def test_abandon_refuses_what_is_in_progress_and_frees_everything() -> None:
    core = new_core()
    core.handle(1, [open_item("a"), decode("a", 3, 50), open_item("b")])
    core.step()
    results = core.abandon(Internal("DEFECT", "x"))
    assert [(connection, result.identity.session_id) for connection, result in results] == [(1, "a")]
    assert (core.load.num_used_blocks, core.load.num_sequences) == (0, 0)


def test_draining_worker_opens_nothing_new_but_goes_on() -> None:
    core = new_core()
    core.handle(1, [open_item("a")])
    core.drain()
    error = error_of(run(core, open_item("b")))
    assert isinstance(error, Unavailable)
    assert core.load.draining
    assert len(run(core, decode("a", 3, 2))) == 2


def decode_all(core: TargetCore, session: str, prefix: tuple[int, ...], num_tokens: int, **kwargs: int) -> int:
    """Opens a sequence, decodes and checks the tokens; returns how many of the prefix's were found cached."""
    before = core.prefix_cache_stats.num_hit_tokens
    results = run(core, open_item(session, prefix, **kwargs), decode(session, len(prefix), num_tokens, **kwargs))
    tokens = tuple(token for result in results for token in tokens_of(result).token_ids)
    assert tokens == simulated_continuation(prefix, num_tokens)
    assert tokens_of(results[-1]).num_cached_tokens == len(prefix) + num_tokens - 1
    return core.prefix_cache_stats.num_hit_tokens - before


PROMPT = tuple(range(30))


def test_second_turn_finds_the_first_ones_tokens() -> None:
    core = new_core()
    assert decode_all(core, "a", PROMPT, 10) == 0
    run(core, close("a", base_len=40))
    second = (*PROMPT, *simulated_continuation(PROMPT, 10), 70, 71, 72)
    assert decode_all(core, "a", second, 5, attempt=2) == 36


def test_running_sequences_share_a_prompt() -> None:
    core = new_core()
    for session, num_hits in (("a", 0), ("b", 28), ("c", 28)):
        assert decode_all(core, session, PROMPT, 3) == num_hits
    assert core.load.num_used_blocks == 7 + 3


def test_trimmed_tokens_do_not_stay_cached() -> None:
    core = new_core()
    decode_all(core, "a", PROMPT, 20)
    run(core, close("a", base_len=33))
    assert decode_all(core, "b", (*PROMPT, *simulated_continuation(PROMPT, 20)), 5) == 32


def test_disconnect_keeps_what_some_item_stood_on() -> None:
    core = new_core()
    tokens = (*PROMPT, *simulated_continuation(PROMPT, 20))
    decode_all(core, "a", PROMPT, 10)
    run(core, decode("a", 40, 10))
    core.disconnect(1)
    assert decode_all(core, "a", (*tokens, 1), 5, attempt=2) == 36


def test_newer_open_of_a_session_finds_the_older_ones_prefix() -> None:
    core = new_core()
    decode_all(core, "a", PROMPT, 2)
    assert decode_all(core, "a", PROMPT, 2, attempt=2) == 28


def test_preempted_sequence_finds_its_own_blocks_again() -> None:
    core = new_core(num_blocks=24)
    core.handle(1, [open_item("old", PROMPT, max_new_tokens=60), decode("old", 30, 60)])
    core.handle(1, [open_item("new", tuple(range(100, 130)), max_new_tokens=60), decode("new", 30, 60)])
    results = [tokens_of(result) for result in run(core)]
    for session, prefix in (("old", PROMPT), ("new", tuple(range(100, 130)))):
        tokens = [token for r in results if r.identity.session_id == session for token in r.token_ids]
        assert tuple(tokens) == simulated_continuation(prefix, 60)
    assert core.prefix_cache_stats.num_hit_tokens > 0


def test_rejected_tokens_are_never_found() -> None:
    core = new_core()
    wrong = (1, 2, 3, 4, 5, 6, 7)
    run(core, open_item("a", PROMPT), verify("a", 30, wrong))
    run(core, close("a", base_len=31))
    assert decode_all(core, "b", (*PROMPT, *wrong), 4) == 28


def test_other_salts_share_nothing() -> None:
    core = new_core()
    decode_all(core, "a", PROMPT, 2)
    item = replace(open_item("b", PROMPT), cache_salt=b"b")
    run(core, item, decode("b", 30, 2))
    assert core.prefix_cache_stats.num_hit_tokens == 0


def test_nothing_stays_cached_behind_a_failed_step() -> None:
    core = new_core()
    decode_all(core, "a", PROMPT, 2)
    core.abandon(Internal("DEFECT", "x"))
    assert decode_all(core, "b", PROMPT, 2) == 0


@dataclass
class Session:
    """What a coordinator knows of one session, and the tokens that must come."""

    name: str
    prefix: tuple[int, ...]
    committed: list[int] = field(default_factory=list)
    attempt: int = 0
    connection: int = 0
    is_open: bool = False
    awaits: int = 0
    """Answers with done=True still due."""

    def __post_init__(self) -> None:
        self.expected = simulated_continuation(self.prefix, 30)

    def next_turn(self, num_trimmed: int) -> None:
        """Drops the last tokens, as a coordinator does behind a stop string, and asks something new."""
        del self.committed[len(self.committed) - min(num_trimmed, len(self.committed)) :]
        self.prefix = (*self.prefix, *self.committed, 65, 66)[-50:]
        self.committed, self.expected = [], simulated_continuation(self.prefix, 30)

    @property
    def base_len(self) -> int:
        return len(self.prefix) + len(self.committed)

    @property
    def num_left(self) -> int:
        return len(self.expected) - len(self.committed)

    def drafts(self, num_right: int, num_wrong: int) -> tuple[int, ...]:
        done = len(self.committed)
        return self.expected[done : done + num_right] + (1,) * num_wrong


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["open", "verify", "decode", "interrupt", "close", "next turn", "disconnect", "step", "step", "step"]
        ),
        st.integers(0, 3),
        st.integers(0, 6),
        st.integers(0, 2),
    ),
    max_size=60,
)


class Coordinator:
    """Drives a core with any actions that its protocol allows, and checks every answer against what must come."""

    def __init__(self, core: TargetCore) -> None:
        self.core = core
        self.sessions = [Session(str(n), tuple(range(1, 2 + 9 * max(1, n)))) for n in range(4)]

    def act(self, action: str, which: int, num: int, num_wrong: int) -> None:
        session = self.sessions[which]
        if action == "step":
            if self.core.has_work:
                self.take(self.core.step())
        elif action == "disconnect":
            self.core.disconnect(num % 2)
            for other in self.sessions:
                if other.connection == num % 2:
                    other.is_open, other.awaits = False, 0
        elif action == "open":
            self.open(session, num % 2)
        elif session.is_open:
            self.take(self.core.handle(session.connection, self.items(action, session, num, num_wrong)))

    def open(self, session: Session, connection: int) -> None:
        if not session.num_left:
            return
        session.attempt += 1
        overtaken = session.awaits
        prefix = (*session.prefix, *session.committed)
        item = open_item(session.name, prefix, attempt=session.attempt, max_new_tokens=session.num_left)
        results = self.core.handle(connection, [item])
        assert len(results) == overtaken
        assert all(isinstance(result, Refused) and result.error.reason == "STALE" for _, result in results)
        session.connection, session.is_open, session.awaits = connection, True, 0

    def items(self, action: str, session: Session, num: int, num_wrong: int) -> list[TargetItem]:
        name, attempt = session.name, session.attempt
        if action in ("close", "next turn"):
            session.is_open, session.awaits = False, 0
            if action == "next turn":
                session.next_turn(num_wrong)
                return [close(name, attempt=attempt, base_len=len(session.prefix) - 2)]
            return [close(name, attempt=attempt, base_len=session.base_len)]
        if action == "interrupt":
            return [decode(name, session.base_len, 0, attempt=attempt)]
        if session.awaits or not session.num_left:
            return []
        session.awaits = 1
        if action == "verify":
            return [verify(name, session.base_len, session.drafts(num, num_wrong), attempt=attempt)]
        return [decode(name, session.base_len, num + 1, attempt=attempt)]

    def take(self, results: list[tuple[int, Tokens | Refused]]) -> None:
        for connection, result in results:
            tokens = tokens_of(result)
            session = next(s for s in self.sessions if s.name == tokens.identity.session_id)
            assert session.awaits == 1
            assert connection == session.connection
            assert tokens.identity.attempt == session.attempt
            assert tokens.identity.base_len == session.base_len
            session.committed += tokens.token_ids
            assert tuple(session.committed) == session.expected[: len(session.committed)]
            session.awaits -= tokens.done


@settings(deadline=None, max_examples=150)
@given(ACTIONS, st.integers(20, 40), st.integers(3, 40))
def test_tokens_are_the_continuation_whatever_happens(
    actions: list[tuple[str, int, int, int]], num_blocks: int, prefill_budget: int
) -> None:
    core = new_core(num_blocks=num_blocks, max_sequences=4, prefill_budget=prefill_budget)
    coordinator = Coordinator(core)
    for action in actions:
        coordinator.act(*action)
        core.check_integrity()
    for _ in range(400):
        if not core.has_work:
            break
        coordinator.take(core.step())
        core.check_integrity()
    assert not core.has_work
    assert [session.awaits for session in coordinator.sessions] == [0] * 4
    core.disconnect(0)
    core.disconnect(1)
    assert core.load.num_used_blocks == 0


def test_idle_sequences_are_not_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    core = new_core()
    run(core, *[open_item(session) for session in "abcd"])
    planned = note_planned(monkeypatch)
    run(core, decode("b", 3, 5))
    assert planned == [(1, 4)] * 5
