"""What a step costs the sequences that have nothing to compute: nothing is planned for them."""

from __future__ import annotations

import pytest

from services.engine.scheduler import Demand, Scheduler
from services.engine.sequence import Sequence
from services.engine.step import Work


def note_planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each plan from now on: the demands, and the open sequences that it was told of."""
    planned: list[tuple[int, int]] = []
    plan = Scheduler.plan

    def noting(
        self: Scheduler, demands: list[Demand], num_expected_rows: int = 0, sequences: list[Sequence] | None = None
    ) -> list[Work]:
        planned.append((len(demands), len(sequences or demands)))
        return plan(self, demands, num_expected_rows, sequences)

    monkeypatch.setattr(Scheduler, "plan", noting)
    return planned
