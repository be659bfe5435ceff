"""Traces of real services, kept in memory: who is whose parent, across three services, and what is not traced."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common.errors import ConfigError, InvalidArgument
from services.common.open_tracer import open_tracer
from services.common.otel import OtelTracer, new_provider
from services.common.service import wait_until
from services.common.tracing import NO_TRACER, Tracer
from tests.integration.coordinator.conftest import DRAFT, TARGET, StartCluster, start_cluster

__all__ = ["start_cluster"]

SLOW = replace(TARGET, simulated_step_ms=3.0)
FIELDS = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True, "sampling": sampling_pb2.SamplingParams(temperature=0)}
CALLERS_SPAN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


class Traced:
    """A tracer for each service, as in three processes, and what they recorded together."""

    def __init__(self, sample: float) -> None:
        self._exporter = InMemorySpanExporter()
        self._providers: list[TracerProvider] = []
        self.tracers: dict[str, Tracer] = {}
        for service in ("coordinator", "draft", "target"):
            provider = new_provider(sample if service == "coordinator" else 0.0, service)
            provider.add_span_processor(SimpleSpanProcessor(self._exporter))
            self._providers.append(provider)
            self.tracers[service] = OtelTracer(provider)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def shutdown(self) -> None:
        for provider in self._providers:
            provider.shutdown()


@pytest.fixture
def traced() -> Iterator[Traced]:
    traced = Traced(sample=1.0)
    yield traced
    traced.shutdown()


def span_id(span: ReadableSpan) -> int:
    return span.get_span_context().span_id


def parent_id(span: ReadableSpan) -> int:
    return span.parent.span_id if span.parent else 0


async def test_a_generation_is_one_trace_with_a_span_a_round_and_the_workers_below(
    start_cluster: StartCluster, traced: Traced
) -> None:
    async with start_cluster(target=SLOW, tracers=traced.tracers) as cluster:
        result = await cluster.generate(**FIELDS, num_draft_tokens=4)
    statistics = result.finished.statistics
    [root] = traced.named("outrider.generate")
    assert {span.get_span_context().trace_id for span in traced.spans} == {root.get_span_context().trace_id}
    assert root.attributes["outrider.session_id"] == result.started.session_id
    assert (root.attributes["outrider.finish_reason"], root.attributes["outrider.num_tokens"]) == ("length", 40)
    rounds = traced.named("outrider.round")
    assert len(rounds) == len(statistics.rounds) > 2
    assert {parent_id(span) for span in rounds} == {span_id(root)}
    for name, service in (("draft.propose", "outrider-draft"), ("target.verify", "outrider-target")):
        spans = traced.named(name)
        assert [parent_id(span) for span in spans] == [span_id(span) for span in rounds]
        assert {span.resource.attributes["service.name"] for span in spans} == {service}
        assert [span.attributes["outrider.round"] for span in spans] == [s.attributes["outrider.round"] for s in rounds]
        for span, parent in zip(spans, rounds, strict=True):
            assert parent.start_time - 10**6 <= span.start_time <= span.end_time <= parent.end_time + 10**6
    accepted = sum(span.attributes["outrider.num_accepted_tokens"] for span in traced.named("target.verify"))
    assert accepted >= statistics.num_accepted_tokens > 0
    [prefill] = traced.named("draft.prefill")
    assert parent_id(prefill) == span_id(root)


async def test_plain_decoding_is_one_span_on_either_side_however_many_tokens(
    start_cluster: StartCluster, traced: Traced
) -> None:
    async with start_cluster(tracers=traced.tracers) as cluster:
        await cluster.generate(**FIELDS, num_draft_tokens=0)
    [decode], [target] = traced.named("outrider.decode"), traced.named("target.decode")
    assert parent_id(target) == span_id(decode)
    assert target.attributes["outrider.num_tokens"] == 40


async def test_a_callers_span_is_the_parent_and_its_decision_is_kept(
    start_cluster: StartCluster, traced: Traced
) -> None:
    async with start_cluster(tracers=traced.tracers) as cluster:
        for traceparent in (CALLERS_SPAN, NOT_SAMPLED):
            request = pb.GenerateRequest(**FIELDS, num_draft_tokens=0)
            async for _ in cluster.stub.Generate(request, metadata=(("traceparent", traceparent),)):
                pass
    [root] = traced.named("outrider.generate")
    assert f"{root.get_span_context().trace_id:032x}" == CALLERS_SPAN.split("-")[1]
    assert f"{parent_id(root):016x}" == CALLERS_SPAN.split("-")[2]
    assert {span.get_span_context().trace_id for span in traced.spans} == {root.get_span_context().trace_id}


async def test_what_is_not_sampled_is_traced_nowhere(start_cluster: StartCluster) -> None:
    traced = Traced(sample=0.0)
    async with start_cluster(target=SLOW, tracers=traced.tracers) as cluster:
        await cluster.generate(**FIELDS, num_draft_tokens=4)
    assert traced.spans == ()
    traced.shutdown()


async def test_an_error_ends_its_spans_with_the_reason_and_without_what_was_asked(
    start_cluster: StartCluster, traced: Traced
) -> None:
    small = replace(TARGET, num_blocks=4)
    async with start_cluster(target=small, draft=None, tracers=traced.tracers) as cluster:
        with pytest.raises(InvalidArgument):
            await cluster.generate(**FIELDS | {"prompt": "secret " * 20})
    [root] = traced.named("outrider.generate")
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "PROMPT_TOO_LONG")
    assert "secret" not in "".join(span.to_json() for span in traced.spans)


async def test_a_client_that_goes_away_leaves_no_open_span(start_cluster: StartCluster, traced: Traced) -> None:
    async with start_cluster(target=SLOW, draft=DRAFT, tracers=traced.tracers) as cluster:
        call = cluster.stub.Generate(pb.GenerateRequest(**FIELDS | {"max_tokens": 20_000}))
        assert await call.read() is not grpc.aio.EOF
        call.cancel()
        assert await wait_until(lambda: bool(traced.named("outrider.generate")), 10)
    [root] = traced.named("outrider.generate")
    assert root.attributes["outrider.cancelled"] is True


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans as an OTLP collector does."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: object) -> object:
        for resource in request.resource_spans:
            self.names += [span.name for scope in resource.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def test_spans_arrive_at_the_endpoint_before_the_service_has_ended() -> None:
    receiver, server = Receiver(), grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with open_tracer(f"http://127.0.0.1:{port}", 1.0, "coordinator") as tracer:
        with tracer.start("outrider.generate") as span, span.child("outrider.round"):
            pass
        assert receiver.names == []
    server.stop(None).wait(5)
    assert sorted(receiver.names) == ["outrider.generate", "outrider.round"]


def test_without_an_endpoint_nothing_of_opentelemetry_is_loaded(monkeypatch) -> None:
    with open_tracer("", 1.0, "target") as tracer:
        assert tracer is NO_TRACER
    monkeypatch.setitem(sys.modules, "services.common.otel", None)
    with pytest.raises(ConfigError, match=r"outrider\[traces\]"), open_tracer("http://127.0.0.1:1", 1.0, "target"):
        pass
