"""A worker's spans: one for each item that it answered, in the trace of the generation that sent it.

Owns: which sequences of a stream are traced, and since when their items are in progress. Must not know: the engine,
which says in its results how long it took, so that the hot path has no part in this.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from services.common.items import Close, Decode, Identity, Open, Opened, Propose, Proposed, Refused, Tokens, Verify
from services.common.tracing import Attribute, Tracer, trace_id_of

MAX_TRACED = 4096
"""Sequences of one stream; further ones are not traced."""

_NAMES: dict[type, str] = {Open: "draft.prefill", Propose: "draft.propose", Verify: "target.verify"}
_DECODE = "target.decode"


@dataclass(slots=True)
class _Traced:
    """A sequence's trace, and the item in progress. Of a Decode, what its answers until now add up to."""

    traceparent: str
    name: str = _NAMES[Open]
    parent_span_id: int = 0
    started_ns: int = 0
    forward_ns: int = 0
    num_tokens: int = 0


class ItemSpans:
    """Of one stream. Used by the event loop only."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._traced: dict[tuple[str, tuple[int, int]], _Traced] = {}

    def trace_id(self, identity: Identity) -> str:
        """Empty where the sequence is not traced."""
        traced = self._traced.get(_key(identity))
        return trace_id_of(traced.traceparent) if traced else ""

    def arrived(self, items: Iterable[Any]) -> None:
        """Takes note of the items of traced sequences."""
        for item in items:
            if isinstance(item, Open) and item.traceparent and len(self._traced) < MAX_TRACED:
                self._traced[_key(item.identity)] = _Traced(item.traceparent)
            elif self._traced:
                self._take(item)

    def _take(self, item: Any) -> None:
        key = _key(item.identity)
        traced = self._traced.get(key)
        if traced is None:
            return
        if isinstance(item, Close):
            del self._traced[key]
        elif isinstance(item, Propose | Verify) or (isinstance(item, Decode) and item.num_free_tokens):
            traced.name = _NAMES.get(type(item), _DECODE)
            traced.parent_span_id = item.parent_span_id
            traced.started_ns = traced.forward_ns = traced.num_tokens = 0

    def left(self, results: Iterable[Any]) -> None:
        """Records what is answered."""
        if not self._traced:
            return
        now_ns = time.time_ns()
        for result in results:
            if (traced := self._traced.get(_key(result.identity))) is not None:
                self._answer(traced, result, now_ns)

    def _answer(self, traced: _Traced, result: Any, now_ns: int) -> None:
        timings = result.timings
        traced.started_ns = traced.started_ns or now_ns - timings.total_ns
        traced.forward_ns += timings.forward_ns
        if isinstance(result, Tokens):
            traced.num_tokens += len(result.token_ids)
            if not result.done:
                return
        attributes: dict[str, Attribute] = {
            "session_id": result.identity.session_id,
            "round": result.identity.round,
            "queue_ms": timings.queue_ns / 1e6,
            "forward_ms": traced.forward_ns / 1e6,
            **_counts(traced, result),
        }
        self._tracer.record(
            _NAMES[Open] if isinstance(result, Opened) else traced.name,
            traceparent=traced.traceparent,
            parent_span_id=0 if isinstance(result, Opened) else traced.parent_span_id,
            started_ns=traced.started_ns,
            ended_ns=now_ns,
            attributes=attributes,
            error=result.error.reason if isinstance(result, Refused) else "",
        )
        traced.started_ns = traced.forward_ns = traced.num_tokens = 0


def _counts(traced: _Traced, result: Any) -> dict[str, Attribute]:
    match result:
        case Proposed():
            return {"num_tokens": len(result.proposal.token_ids)}
        case Tokens():
            return {
                "num_tokens": traced.num_tokens,
                "num_draft_tokens": result.num_draft_tokens,
                "num_accepted_tokens": result.num_accepted_tokens,
                "step_rows": result.step_rows,
            }
    return {}


def _key(identity: Identity) -> tuple[str, tuple[int, int]]:
    return identity.session_id, identity.generation
