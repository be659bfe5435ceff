"""The seam between services and whatever records traces.

Owns: what a span can do, trace context in W3C form, and the tracer that records nothing. Must not know: OpenTelemetry
(services.common.otel implements this with it), the wire.

A generation is one trace: a span of its own on the coordinator, a child for each round, and below that the workers'.
`Span.id` travels with a round's items, `Span.traceparent` with the Open before them; both are empty where nothing is
recorded, so that an untraced generation pays nothing on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

Attribute = str | int | float | bool


class Span(Protocol):
    """A context manager: it ends on exit, with the error that is under way there."""

    @property
    def id(self) -> int:
        """0: not recorded."""
        ...

    @property
    def traceparent(self) -> str:
        """Empty: not recorded."""
        ...

    def set(self, **attributes: Attribute) -> None:
        """Adds attributes, whose names get the prefix `outrider.`."""
        ...

    def child(self, name: str, **attributes: Attribute) -> Span: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None: ...


class Tracer(Protocol):
    """Safe to use from any thread."""

    def start(self, name: str, traceparent: str = "", **attributes: Attribute) -> Span:
        """A span below the caller's, if there is one, else a root that may or may not be sampled."""
        ...

    def record(
        self,
        name: str,
        *,
        traceparent: str,
        parent_span_id: int,
        started_ns: int,
        ended_ns: int,
        attributes: Mapping[str, Attribute],
        error: str = "",
    ) -> None:
        """A span that is over already, in a trace that was begun elsewhere. Times since the epoch.

        `parent_span_id` 0: the span that `traceparent` names.
        """
        ...


class _NoSpan:
    """Records nothing."""

    id = 0
    traceparent = ""

    def set(self, **attributes: Attribute) -> None:
        pass

    def child(self, name: str, **attributes: Attribute) -> _NoSpan:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        pass


class _NoTracer:
    """Records nothing."""

    def start(self, name: str, traceparent: str = "", **attributes: Attribute) -> Span:
        return NO_SPAN

    def record(self, name: str, **details: object) -> None:
        pass


NO_SPAN: Span = _NoSpan()
NO_TRACER: Tracer = _NoTracer()


def trace_id_of(traceparent: str) -> str:
    """The trace's id in hexadecimal; empty where there is none."""
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 else ""
