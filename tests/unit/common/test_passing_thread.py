"""What builds an engine leaves no thread behind whose OpenMP threads would make the engine's sleep."""

from __future__ import annotations

import threading

import pytest

from services.common.worker_server import _in_passing_thread


async def test_the_thread_has_ended_when_its_result_is_there() -> None:
    thread = await _in_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


async def test_errors_come_through() -> None:
    with pytest.raises(ZeroDivisionError):
        await _in_passing_thread(lambda: 1 // 0)
