"""Log records as lines: text for people, JSON for collectors.

Owns: the formats, and which fields name the work that a record is about. Must not know: what is logged. Neither
prompts, nor generated text, nor credentials are ever part of a record: those who log see to that.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
WORK_FIELDS = ("session_id", "round", "trace_id")


def work_fields(session_id: str, round_number: int, trace_id: str) -> dict[str, object]:
    """For `extra` of a record about a generation. Without a round (below 0) or a trace (empty) those are left out."""
    fields: dict[str, object] = {"session_id": session_id}
    if round_number >= 0:
        fields["round"] = round_number
    if trace_id:
        fields["trace_id"] = trace_id
    return fields


class JsonFormatter(logging.Formatter):
    """One object a record: time (UTC), level, logger, message; session_id, round and trace_id where they are known; an
    exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: record.__dict__[name] for name in WORK_FIELDS if name in record.__dict__}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)
