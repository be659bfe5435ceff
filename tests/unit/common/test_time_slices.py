"""A thread with short slices has them while it asked for them, and runs soon after it wakes."""

from __future__ import annotations

import threading

import pytest

from services.common import time_slices
from services.common.time_slices import SHORT_SLICE_NS, short_slices, slice_ns


def _grants_slices() -> bool:
    with short_slices():
        return slice_ns() == SHORT_SLICE_NS


needs_slices = pytest.mark.skipif(not _grants_slices(), reason="the kernel grants no slices (Linux before 6.12)")


@needs_slices
def test_slices_are_short_inside_and_as_before_outside() -> None:
    before = slice_ns()
    with short_slices():
        assert slice_ns() == SHORT_SLICE_NS
    assert slice_ns() == before > SHORT_SLICE_NS


@needs_slices
def test_threads_that_run_already_keep_theirs() -> None:
    may_end, found = threading.Event(), []

    def run() -> None:
        may_end.wait(10)
        found.append(slice_ns())

    thread = threading.Thread(target=run)
    thread.start()
    before = slice_ns()
    with short_slices():
        may_end.set()
        thread.join()
    assert found == [before]


def test_a_system_that_knows_no_slices_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_slices, "_GET", None)
    with short_slices():
        assert slice_ns() == 0
    monkeypatch.undo()
    monkeypatch.setattr(time_slices, "_GET", 10**6)  # a call that the kernel does not have
    with short_slices():
        assert slice_ns() == 0
