"""A delaying proxy for measurements, and how much delay makes a round trip longer by what is wanted.

Owns: the proxy's thread. Must not know: what passes through it.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable

from tests.fakes.tcp_proxy import TcpProxy

_NUM_PINGS = 50
_STEP_S = 0.25e-3


class ProxyThread:
    """A proxy to a port of this machine, with an event loop and thread of its own."""

    def __init__(self, port: int = 0) -> None:
        """A `port` of 0 is to be given by `lead_to`."""
        self.proxy = TcpProxy("127.0.0.1", port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> ProxyThread:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.proxy.start(), self._loop).result()
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio.run_coroutine_threadsafe(self.proxy.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lead_to(self, port: int) -> int:
        """Has it forward to `port`; returns its own."""
        self.proxy.target = ("127.0.0.1", port)
        return self.proxy.port

    def calibrate(self, delay_ms: float, ping: Callable[[], object]) -> float:
        """The least seconds each way that make a round trip longer by `delay_ms`: timers add some of their own."""
        self.proxy.delay_s = 0.0
        wanted_ms = round_trip_ms(ping) + delay_ms
        self.proxy.delay_s = max(0.0, delay_ms / 2e3 - 2 * _STEP_S)
        while round_trip_ms(ping) < wanted_ms:
            self.proxy.delay_s += _STEP_S
        return self.proxy.delay_s


def round_trip_ms(ping: Callable[[], object]) -> float:
    """Median of a call's."""
    return statistics.median(_timed(ping) for _ in range(_NUM_PINGS))


def _timed(ping: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    ping()
    return (time.perf_counter() - started_s) * 1e3
