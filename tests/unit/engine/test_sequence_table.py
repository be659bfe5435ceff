"""The fence against overtaken work."""

from __future__ import annotations

from services.engine.sequence_table import FENCE_TTL_NS, Fence
from tests.unit.item_builders import ManualClock, identity


def test_fence_remembers_the_newest_generation() -> None:
    fence = Fence(ManualClock())
    fence.note(identity(base_len=1, attempt=5))
    fence.note(identity(base_len=1, attempt=3))
    assert fence.newest("a") == (1, 5)


def test_lease_epoch_counts_before_attempt() -> None:
    fence = Fence(ManualClock())
    fence.note(identity(base_len=1, lease_epoch=2, attempt=1))
    fence.note(identity(base_len=1, lease_epoch=1, attempt=9))
    assert fence.newest("a") == (2, 1)


def test_fence_forgets_after_ten_minutes_without_notice() -> None:
    clock = ManualClock()
    fence = Fence(clock)
    fence.note(identity("a", base_len=1))
    fence.note(identity("b", base_len=1))
    clock.now_ns = FENCE_TTL_NS - 1
    fence.note(identity("a", base_len=1))
    clock.now_ns = FENCE_TTL_NS
    assert fence.newest("b") is None
    assert fence.newest("a") == (1, 1)


def test_full_fence_forgets_the_oldest() -> None:
    fence = Fence(ManualClock(), max_sessions=2)
    for session in "abc":
        fence.note(identity(session, base_len=1))
    assert [fence.newest(session) for session in "abc"] == [None, (1, 1), (1, 1)]
