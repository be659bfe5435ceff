"""Times read from a report of `outrider bench`, taken with one request at a time.

Owns: what the report's figures say about a round. Must not know: the simulation's inside, tables. Pure but for reading.

    step_ms      a plainly decoded token
    alphas       the conditional acceptance by position
    overhead_ms  the coordinator's median overhead a round
    token_ms     what a speculative round takes beyond these, over its draft tokens: drafting, and the further rows of
                 the target's step, which such a report cannot tell apart
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from services.cli.failure import CommandFailed
from services.cli.plan.simulation import Times


def read_times(file: Path) -> Times:
    """Raises CommandFailed where the file is no such report."""
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CommandFailed(f"cannot read {file}: {error}") from None
    try:
        return times_of(report)
    except (KeyError, TypeError, ZeroDivisionError):
        raise CommandFailed(f"{file}: not a report of `outrider bench` with plain and speculative requests") from None


def times_of(report: dict[str, Any]) -> Times:
    """Raises KeyError or TypeError where a figure is missing."""
    step_ms = float(report["plain"]["decode_ms_per_token"])
    overhead_ms = float(report["coordinator_overhead_ms"]["p50"])
    round_ms = float(report["speculative"]["decode_ms_per_token"]) * float(report["mean_acceptance_length"])
    num_draft_tokens = report["num_draft_tokens"] / report["num_drafts"]
    return Times(
        step_ms=step_ms,
        token_ms=max(0.0, round_ms - step_ms - overhead_ms) / num_draft_tokens,
        alphas=tuple(float(alpha) for alpha in report["conditional_acceptance_per_position"]) or (0.0,),
        delay_ms=0.0,
        overhead_ms=overhead_ms,
    )
