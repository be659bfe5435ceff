"""The plan's rule for holding a step is the engine's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.cli.plan.hold import Away, held_until_ms
from services.cli.plan.hold import Ready as PlanReady
from services.engine.hold import HoldPolicy, Ready, Rhythm

NOW_MS = 1000.0
STEP_MS, ROW_MS = 20.0, 0.5


class Times:
    """The engine's estimate, exact."""

    def rows_ns(self, num_rows: int) -> float:
        return rows_ms(num_rows) * 1e6


def rows_ms(num_rows: int) -> float:
    return STEP_MS + ROW_MS * num_rows if num_rows else 0.0


RHYTHM = st.builds(
    Rhythm,
    num_rows=st.integers(1, 9),
    num_tokens=st.just(2.0),
    left_ns=st.integers(900, 999).map(lambda ms: ms * 10**6),
    gap_ns=st.integers(1, 80).map(lambda ms: ms * 1e6),
    deviation_ns=st.integers(0, 10).map(lambda ms: ms * 1e6),
)


@given(st.lists(RHYTHM, max_size=12), st.integers(1, 8), st.integers(0, 30), st.sampled_from([0.0, 5.0]))
def test_it_decides_as_the_engine_does(away: list[Rhythm], num_ready: int, held_ms: int, prefill_ms: float) -> None:
    since_ms = NOW_MS - held_ms
    policy = HoldPolicy(Times())  # type: ignore[arg-type]
    policy._held_since_ns = int(since_ms * 1e6)
    ready = Ready(num_ready, 5 * num_ready, 2.0 * num_ready, prefill_ns=prefill_ms * 1e6)
    wanted_ms = policy.hold_ns(int(NOW_MS * 1e6), ready, away) / 1e6
    due = [
        Away(r.usual_ns / 1e6, r.due_ns / 1e6, r.gap_ns / 1e6, r.deviation_ns / 1e6, r.num_rows)
        for r in away
        if r.due_ns > NOW_MS * 1e6
    ]
    until_ms = held_until_ms(NOW_MS, PlanReady(since_ms, num_ready, 5 * num_ready, prefill_ms), due, rows_ms)
    assert abs(until_ms - NOW_MS - wanted_ms) < 1e-5
