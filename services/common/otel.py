"""Traces by OpenTelemetry: the one place that knows its libraries (extra `traces`).

Owns: sampling, export, and how spans of the seam (services.common.tracing) become OpenTelemetry's. Must not know: what
is traced. Nothing is registered globally.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Self

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    format_span_id,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace import Span as OpenTelemetrySpan
from opentelemetry.trace import Tracer as OpenTelemetryTracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.errors import OutriderError
from services.common.tracing import NO_SPAN, Attribute, Span

_PREFIX = "outrider."
_EXPORT_S = 2
"""For one batch of spans; a receiver that is away holds up a service's end no longer."""
_PROPAGATOR = TraceContextTextMapPropagator()


def exporting_provider(endpoint: str, sample: float, service: str) -> TracerProvider:
    """A provider that sends `sample` of the traces begun here to an OTLP receiver, in the background.

    `endpoint` is http://HOST:PORT, or https:// for TLS. Call `shutdown` in the end.
    """
    provider = new_provider(sample, service)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)))
    return provider


def new_provider(sample: float, service: str) -> TracerProvider:
    """Samples `sample` of the roots; a caller's decision, where there is one, is kept."""
    resource = Resource.create({"service.name": f"outrider-{service}"})
    return TracerProvider(sampler=ParentBased(TraceIdRatioBased(sample)), resource=resource, shutdown_on_exit=False)


class OtelTracer:
    """services.common.tracing.Tracer."""

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("outrider")

    def start(self, name: str, traceparent: str = "", **attributes: Attribute) -> Span:
        context = _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})
        span = self._tracer.start_span(name, context, SpanKind.SERVER, _prefixed(attributes))
        return _OtelSpan(self._tracer, span) if span.is_recording() else NO_SPAN

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
        context = _PROPAGATOR.extract({"traceparent": traceparent})
        if parent_span_id:
            opened = get_current_span(context).get_span_context()
            parent = SpanContext(opened.trace_id, parent_span_id, is_remote=True, trace_flags=opened.trace_flags)
            context = set_span_in_context(NonRecordingSpan(parent))
        span = self._tracer.start_span(name, context, SpanKind.SERVER, _prefixed(attributes), start_time=started_ns)
        if error:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(ended_ns)


class _OtelSpan:
    """services.common.tracing.Span."""

    def __init__(self, tracer: OpenTelemetryTracer, span: OpenTelemetrySpan) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def id(self) -> int:
        return self._span.get_span_context().span_id

    @property
    def traceparent(self) -> str:
        context = self._span.get_span_context()
        flags = f"{context.trace_flags & TraceFlags.SAMPLED:02x}"
        return f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-{flags}"

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes(_prefixed(attributes))

    def child(self, name: str, **attributes: Attribute) -> Span:
        context = set_span_in_context(self._span)
        return _OtelSpan(self._tracer, self._tracer.start_span(name, context, attributes=_prefixed(attributes)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Only reasons are kept of errors: their messages may quote what was asked."""
        if isinstance(error, OutriderError):
            self._span.set_status(Status(StatusCode.ERROR, error.reason))
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            self.set(cancelled=True)
        elif error is not None:
            self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        self._span.end()


def _prefixed(attributes: Mapping[str, Attribute]) -> dict[str, Attribute]:
    return {_PREFIX + name: value for name, value in attributes.items()}
