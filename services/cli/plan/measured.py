"""Times read from a report of `outrider bench`, taken with one request at a time and a fixed draft length.

Owns: what the report's figures say about a round. Must not know: the simulation's inside, tables. Pure but for reading.
Figures are a token asked for, whether the drafter proposed it or not: K is the number of positions in the report.

    row_ms       what a round's verify takes beyond a plainly decoded token, over K
    step_ms      a plainly decoded token, less its row
    token_ms     the draft's time in a round, over K
    overhead_ms  the rest of a round
    alphas       accepted at a position in a round, over accepted at the one before
    prefill      all requests' TTFT beyond a plainly decoded token and the rest of a round, over their prompts' tokens;
                 of a prompt sent twice the slower time counts, since the second one found it cached
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from services.cli.failure import CommandFailed
from services.cli.plan.setting import Times


class Measured(NamedTuple):
    """What a report says. `prompt_len`: the mean; 0 where it names no requests."""

    times: Times
    prompt_len: int


def read_times(file: Path) -> Measured:
    """Raises CommandFailed where the file is no such report."""
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CommandFailed(f"cannot read {file}: {error}") from None
    try:
        return times_of(report)
    except (KeyError, TypeError, ZeroDivisionError):
        raise CommandFailed(f"{file}: not a report of `outrider bench` with plain and speculative requests") from None


def times_of(report: dict[str, Any]) -> Measured:
    """Raises KeyError, TypeError or ZeroDivisionError where a figure is missing."""
    limits, rates = report["limits"], report["acceptance_rate_per_position"]
    plain_ms, num_draft_tokens = float(limits["plain_ms_per_token"]), len(rates)
    row_ms = max(0.0, limits["verify_ms"] - plain_ms) / num_draft_tokens
    share = report["num_drafts"] / limits["num_rounds"]
    survivals = [1.0, *(share * rate for rate in rates)]
    num_prompt_tokens, ttft_ms = _prompts(report)
    decode_ms = plain_ms + float(limits["overhead_ms"])
    times = Times(
        step_ms=max(0.0, plain_ms - row_ms),
        row_ms=row_ms,
        token_ms=limits["draft_ms"] / num_draft_tokens,
        alphas=tuple(min(1.0, later / earlier) if earlier else 0.0 for earlier, later in pairwise(survivals)),
        delay_ms=0.0,
        overhead_ms=float(limits["overhead_ms"]),
        prefill_token_ms=max(0.0, sum(ttft_ms) - decode_ms * len(ttft_ms)) / max(1, sum(num_prompt_tokens)),
    )
    return Measured(times, round(sum(num_prompt_tokens) / max(1, len(num_prompt_tokens))))


def _prompts(report: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Each prompt's tokens, and its slowest TTFT. First turns only: of later ones most is cached."""
    firsts: dict[int, tuple[int, float]] = {}
    for request in report.get("requests", ()):
        if request["turn"] or request["ttft_ms"] is None:
            continue
        _, slowest_ms = firsts.get(request["conversation"], (0, 0.0))
        firsts[request["conversation"]] = request["num_prompt_tokens"], max(slowest_ms, request["ttft_ms"])
    return [tokens for tokens, _ in firsts.values()], [ms for _, ms in firsts.values()]
