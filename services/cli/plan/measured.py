"""Times read from a report of `outrider bench`, taken with one request at a time and a fixed draft length.

Owns: what the report's figures say about a round. Must not know: the simulation's inside, tables. Pure but for reading.
Figures are a token asked for, whether the drafter proposed it or not: K is the number of positions in the report.

    row_ms       what a round's verify takes beyond a plainly decoded token, over K
    step_ms      a plainly decoded token, less its row
    token_ms     the draft's time in a round, over K
    overhead_ms  the rest of a round
    alphas       accepted at a position in a round, over accepted at the one before
"""

from __future__ import annotations

import json
from itertools import pairwise
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
    """Raises KeyError, TypeError or ZeroDivisionError where a figure is missing."""
    limits, rates = report["limits"], report["acceptance_rate_per_position"]
    plain_ms, num_draft_tokens = float(limits["plain_ms_per_token"]), len(rates)
    row_ms = max(0.0, limits["verify_ms"] - plain_ms) / num_draft_tokens
    share = report["num_drafts"] / limits["num_rounds"]
    survivals = [1.0, *(share * rate for rate in rates)]
    return Times(
        step_ms=max(0.0, plain_ms - row_ms),
        row_ms=row_ms,
        token_ms=limits["draft_ms"] / num_draft_tokens,
        alphas=tuple(min(1.0, later / earlier) if earlier else 0.0 for earlier, later in pairwise(survivals)),
        delay_ms=0.0,
        overhead_ms=float(limits["overhead_ms"]),
    )
