"""Settings by which a service lets itself be seen: names, defaults and help that all services share.

Owns: these. Must not know: metrics, logs and traces themselves, so that pure modules may import it.
"""

from __future__ import annotations

METRICS_OFF = -1
METRICS_PORT = 9090
METRICS_HELP = "Port of the Prometheus metrics, over HTTP at /metrics; 0 takes a free one, -1 serves none."

TEXT, JSON = "text", "json"
LOG_FORMATS = (TEXT, JSON)
LOG_FORMAT_HELP = "One line of text a record, or one JSON object."

TRACE_ENDPOINT_HELP = "Where traces go by OTLP over gRPC, such as http://127.0.0.1:4317; empty: none are made."
TRACE_SAMPLE = 0.01
TRACE_SAMPLE_HELP = "Share of the generations that are traced, from 0 to 1; a caller's own decision comes first."
