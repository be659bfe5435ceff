"""The tracer that a service's settings ask for.

Owns: that OpenTelemetry is loaded only where it is asked for. Must not know: spans. For composition roots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from services.common.errors import ConfigError
from services.common.tracing import NO_TRACER, Tracer


@contextlib.contextmanager
def open_tracer(endpoint: str, sample: float, service: str) -> Iterator[Tracer]:
    """From enter to exit; then what is left is sent. Without an endpoint it records nothing.

    Raises ConfigError where the libraries are missing.
    """
    if not endpoint:
        yield NO_TRACER
        return
    try:
        from services.common.otel import OtelTracer, exporting_provider
    except ImportError:
        raise ConfigError("trace_endpoint: traces need pip install 'outrider[traces]'") from None
    provider = exporting_provider(endpoint, sample, service)
    try:
        yield OtelTracer(provider)
    finally:
        provider.shutdown()
