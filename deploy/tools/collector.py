"""A collector of traces on this machine, as small as can be: it counts the spans of each service.

Owns: the OTLP endpoint. Must not know: what the spans say.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(NamedTuple):
    """Running; `num_spans` by `service.name` grows meanwhile."""

    endpoint: str
    num_spans: Counter[str]


class _TraceService(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, num_spans: Counter[str]) -> None:
        self._num_spans = num_spans

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        for group in request.resource_spans:
            (name,) = (a.value.string_value for a in group.resource.attributes if a.key == "service.name")
            self._num_spans[name] += sum(len(scope.spans) for scope in group.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """On a free port of the loopback address, from enter to exit."""
    num_spans: Counter[str] = Counter()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(  # type: ignore[no-untyped-call]  # generated
        _TraceService(num_spans), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Collector(f"http://127.0.0.1:{port}", num_spans)
    finally:
        server.stop(1.0).wait()
