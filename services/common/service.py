"""The life of a service process: logging, readiness, signals, draining.

Owns: what SIGTERM and SIGINT mean, and the line that tells a launcher that the service is ready.
Must not know: what the service serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from services.common.logs import TEXT_FORMAT, JsonFormatter
from services.common.telemetry_settings import JSON, TEXT

_CANCEL_AGAIN_S = 0.1


def setup_logging(level: str, log_format: str = TEXT) -> None:
    """Logs go to standard error; standard output carries the ready line only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == JSON else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def announce_ready(service: str, port: int, **more: str | int | float) -> None:
    """One JSON object on one line of standard output: {"event": "ready", "service": ..., "port": ...}."""
    print(json.dumps({"event": "ready", "service": service, "port": port, **more}), flush=True)  # noqa: T201


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the process there and then: nothing is served yet, and a load on a thread can't be cut."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, os._exit, 128 + number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def stop_signals() -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets. The first removes the handlers, so that a second ends the process."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def on_signal() -> None:
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancels tasks until they have ended: libraries swallow a cancellation now and then (redis-py, mid-command)."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)


async def wait_until(condition: Callable[[], bool], timeout_s: float, interval_s: float = 0.05) -> bool:
    """Whether `condition` came true within `timeout_s`."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(interval_s)
    return True
