"""Kernels run in torch's own threads."""

from __future__ import annotations

import ctypes
import threading

import pytest

from services.engine.cpu import team
from services.engine.cpu.team import NO_TEAM, find_team

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def test_all_threads_of_a_team_are_called_and_told_apart() -> None:
    found = find_team()
    assert found != NO_TEAM
    thread_num, num_threads = (ctypes.CFUNCTYPE(ctypes.c_int)(address) for address in found[1:])
    called, lock = [], threading.Lock()

    def function(_: int | None) -> None:
        with lock:
            called.append((thread_num(), num_threads()))

    fork = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(found.fork)
    callback = _FUNCTION(function)
    fork(ctypes.cast(callback, ctypes.c_void_p), None, 3, 0)
    assert sorted(called) == [(0, 3), (1, 3), (2, 3)]


def test_without_the_library_there_is_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team.torch, "__file__", "/nowhere/torch/__init__.py")
    assert find_team() == NO_TEAM
