"""What must be said beside a run's figures, so that they are not read for more than they show.

Owns: those sentences. Must not know: the figures. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.cli.bench.load import LoadPlan
from services.cli.bench.sweep import Case
from services.common.values import VerificationMethod


def notes_on(plan: LoadPlan, cases: Sequence[Case], *, with_peers: bool) -> tuple[str, ...]:
    """One sentence each."""
    methods = {case.verification for case in cases if case.temperature > 0}
    notes = []
    if plan.rate is not None:
        notes.append(
            f"{plan.rate:g} conversations a second arrive in both modes: tokens/s follows the arrivals, and the "
            "speed-up with it; compare latencies"
        )
    if VerificationMethod.REJECTION in methods:
        notes.append(
            "rejection keeps the distribution, not the tokens: sampled outputs need not be identical to plain ones "
            "(--check-distribution compares)"
        )
    if VerificationMethod.THRESHOLD in methods:
        notes.append(
            "threshold is lossy: sampled outputs are not the target's, and its acceptance is no other method's"
        )
    if with_peers and (plan.rate is not None or plan.concurrency > 1):
        notes.append("peers ran one request at a time; Outrider's shared the machine with others")
    return tuple(notes)
