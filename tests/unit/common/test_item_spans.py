"""Which spans a worker records of its items."""

from __future__ import annotations

from typing import Any

from services.common import item_spans
from services.common.errors import Aborted
from services.common.item_spans import ItemSpans
from services.common.items import (
    Close,
    Decode,
    Identity,
    Open,
    Opened,
    Propose,
    Proposed,
    Refused,
    Timings,
    Tokens,
    Verify,
)
from services.common.tracing import trace_id_of
from services.common.values import Proposal, SamplingParams, VerificationMethod

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PROPOSAL = Proposal(1, (5, 6))


class Recorder:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, dict[str, Any]]] = []

    def record(self, name: str, **details: Any) -> None:
        self.spans.append((name, details))

    def start(self, name: str, traceparent: str = "", **attributes: Any) -> Any:
        raise AssertionError("a worker begins no trace")


def who(session: str = "s", round: int = 0) -> Identity:
    return Identity(session, 1, 1, round, 3)


def opening(session: str = "s", traceparent: str = TRACEPARENT) -> Open:
    method = VerificationMethod.COUPLED
    return Open(who(session), (1, 2, 3), 3, frozenset(), SamplingParams(), method, 10, traceparent=traceparent)


def tokens(round: int, num: int, done: bool) -> Tokens:
    return Tokens(who(round=round), (7,) * num, num - 1, 2, done, timings=Timings(1_000_000, 2_000_000, 4_000_000))


def test_each_answer_is_a_span_below_the_round_that_asked() -> None:
    recorder = Recorder()
    spans = ItemSpans(recorder)
    spans.arrived([opening(), Propose(who(round=1), (), 2, 1, parent_span_id=11)])
    spans.left([Opened(who(), Timings(total_ns=5)), Proposed(who(round=1), PROPOSAL, Timings(total_ns=3_000_000))])
    spans.arrived([Verify(who(round=2), PROPOSAL, parent_span_id=12)])
    spans.left([tokens(2, 3, done=True)])
    assert [(name, details["parent_span_id"]) for name, details in recorder.spans] == [
        ("draft.prefill", 0),
        ("draft.propose", 11),
        ("target.verify", 12),
    ]
    verify = recorder.spans[-1][1]
    assert verify["ended_ns"] - verify["started_ns"] == 4_000_000
    assert {"round": 2, "queue_ms": 1.0, "forward_ms": 2.0, "num_tokens": 3}.items() <= verify["attributes"].items()
    assert verify["traceparent"] == TRACEPARENT


def test_a_decode_is_one_span_of_all_its_tokens_and_an_interrupt_is_none() -> None:
    recorder = Recorder()
    spans = ItemSpans(recorder)
    spans.arrived([opening(), Decode(who(), 10, parent_span_id=11)])
    spans.left([tokens(0, 1, done=False), tokens(0, 1, done=False)])
    spans.arrived([Decode(who(), 0)])
    spans.left([tokens(0, 1, done=True)])
    [(name, details)] = recorder.spans
    assert (name, details["parent_span_id"], details["attributes"]["num_tokens"]) == ("target.decode", 11, 3)
    assert details["attributes"]["forward_ms"] == 6.0


def test_a_refusal_is_a_span_with_its_reason() -> None:
    recorder = Recorder()
    spans = ItemSpans(recorder)
    spans.arrived([opening(), Verify(who(), PROPOSAL)])
    spans.left([Refused(who(), Aborted("STALE", "too late"))])
    assert [details["error"] for _, details in recorder.spans] == ["STALE"]


def test_what_is_untraced_or_closed_leaves_no_span() -> None:
    recorder = Recorder()
    spans = ItemSpans(recorder)
    spans.arrived([opening("untraced", ""), opening("closed"), Close(who("closed"))])
    assert spans.trace_id(who("closed")) == spans.trace_id(who("untraced")) == ""
    spans.left([Opened(who("untraced")), Opened(who("closed"))])
    assert recorder.spans == []


def test_sequences_beyond_the_bound_are_not_traced(monkeypatch) -> None:
    monkeypatch.setattr(item_spans, "MAX_TRACED", 2)
    spans = ItemSpans(Recorder())
    spans.arrived([opening(name) for name in "abc"])
    assert [bool(spans.trace_id(who(name))) for name in "abc"] == [True, True, False]


def test_the_trace_id_is_the_second_part() -> None:
    assert trace_id_of(TRACEPARENT) == "0af7651916cd43dd8448eb211c80319c"
    assert trace_id_of("") == trace_id_of("nonsense") == ""
