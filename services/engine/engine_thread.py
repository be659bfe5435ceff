"""The thread that owns a worker's device: items of all connections in, results out, one step after the other.

Owns: the queue before the core, the thread, and what happens when the core fails. Must not know: the wire, asyncio,
torch, what an item means. All that is ready before a step goes into it; an idle thread, or one whose core holds a step
back, waits on a condition.

    any thread      connect, Connection.submit, Connection.close, run, drain, load
    engine thread   the core's methods, and every `deliver`
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from services.common.errors import Internal, OutriderError, ResourceExhausted, Unavailable, WorkerFailed
from services.common.failure import Failure
from services.common.items import Close, Decode, Open, Propose, Refused, Verify, is_ending
from services.common.values import WorkerLoad

log = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Open | Propose | Verify | Decode | Close)
ItemIn = TypeVar("ItemIn", contravariant=True)
Result = TypeVar("Result")
T = TypeVar("T")

QUEUE_RETRY_AFTER_MS = 50
MEMORY_RETRY_AFTER_MS = 1000
STOP_DEADLINE_S = 10.0


class Core(Protocol[ItemIn, Result]):
    """A worker's logic, owned by the engine thread and called by it alone.

    Results come with the connection that they belong to. Errors of single items are results (Refused); what a method
    raises is a defect or a lost device, after which `abandon` is called, and then work goes on with an empty core.
    """

    def handle(
        self, connection: int, items: Sequence[ItemIn], arrived_ns: int | None = None
    ) -> list[tuple[int, Result]]:
        """Takes items in order; returns refusals and what can be answered at once.

        `arrived_ns`: monotonic time at which the items arrived; None: now.
        """
        ...

    def disconnect(self, connection: int) -> None:
        """Ends the connection's sequences and frees their blocks. Unknown connections are ignored."""
        ...

    def step(self) -> list[tuple[int, Result]]:
        """Computes one device step. Called only while `has_work`."""
        ...

    def abandon(self, error: OutriderError) -> list[tuple[int, Result]]:
        """Ends every sequence and frees its blocks; returns one Refused with `error` for every item in progress."""
        ...

    def drain(self) -> None:
        """Opens no sequence from now on, and `load` says so; those that are open go on."""
        ...

    @property
    def has_work(self) -> bool: ...

    @property
    def hold_s(self) -> float:
        """Seconds to wait for further items before the next step, 0 to compute it now. Asked only while `has_work`.

        After that time, or once an item has arrived, it is asked anew. Its bound is the core's affair.
        """
        ...

    @property
    def load(self) -> WorkerLoad: ...

    def check_integrity(self) -> None:
        """Raises where blocks and sequences contradict each other."""
        ...


class Connection(Generic[Item, Result]):
    """One peer's way to the engine. Its sequences end with it."""

    def __init__(
        self,
        engine: EngineThread[Item, Result],
        number: int,
        deliver: Callable[[list[Result | Refused]], None],
    ) -> None:
        self.number = number
        self.deliver = deliver
        self.closed = False
        self._engine = engine

    def submit(self, items: Sequence[Item], arrived_ns: int | None = None) -> None:
        """Queues items without blocking; they reach the core together and in order. A closed connection drops them.

        Raises ResourceExhausted (QUEUE_FULL, retriable) where the queue has no room for them, and then takes none but
        those that end something (items.is_ending), which need no room. One submission always finds room in an empty
        queue. Raises Unavailable (DRAINING) once the engine is stopped. `arrived_ns`: monotonic time at which the items
        came; None: now.
        """
        if not self.closed:
            self._engine._submit(self, items, time.monotonic_ns() if arrived_ns is None else arrived_ns)

    def close(self) -> None:
        """Ends the connection's sequences before the next step. A call of `deliver` in progress is the last one."""
        self._engine._close(self)


@dataclass(frozen=True, slots=True)
class _Arrival(Generic[Item, Result]):
    connection: Connection[Item, Result]
    items: tuple[Item, ...]
    arrived_ns: int


class EngineThread(Generic[Item, Result]):
    """Runs a core on a thread of its own; a context manager.

    `deliver` of a connection is called with all its results of a step, once a step, when `load` counts them already;
    refusals, which need no step, come before it. It must not block; an exception from it closes its connection.
    """

    def __init__(
        self, core: Core[Item, Result], name: str, max_queued_items: int, failure: Failure | None = None
    ) -> None:
        """`failure` may also be reported by what the core stands on; whoever serves ends the worker then."""
        self.failure = failure or Failure()
        self._core = core
        self._name = name
        self._max_queued_items = max_queued_items
        self._wake = threading.Condition()
        self._inbox: list[_Arrival[Item, Result] | Connection[Item, Result] | Callable[[], None]] = []
        self._num_queued_items = 0
        self._connections: dict[int, Connection[Item, Result]] = {}
        self._num_connected = 0
        self._stopping = False
        self._pause_s: float | None = None
        """How long to wait for items before the next step; None: until one arrives."""
        self._load = core.load
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.failed: BaseException | None = None
        """What ended the thread for good; None while it serves. An error of a single step does not end it."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()

    def stop(self, deadline_s: float = STOP_DEADLINE_S) -> bool:
        """Ends the thread after the step in progress and drops open sequences. Returns whether it ended by then."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            log.error("%s: the step in progress did not end within %.1f s", self._name, deadline_s)
        return not self._thread.is_alive()

    def connect(self, deliver: Callable[[list[Result | Refused]], None]) -> Connection[Item, Result]:
        """Adds a connection. Raises Unavailable once the engine is stopped."""
        with self._wake:
            self._check_serving()
            self._num_connected += 1
            connection = Connection(self, self._num_connected, deliver)
            self._connections[connection.number] = connection
        return connection

    @property
    def load(self) -> WorkerLoad:
        """The core's load as of the last items or results, plus what is queued before it."""
        load, num_waiting = self._load, self._num_queued_items
        return replace(load, num_queued=load.num_queued + num_waiting) if num_waiting else load

    def run(self, function: Callable[[], T], timeout_s: float | None = None) -> T:
        """Calls `function` on the engine thread, between steps; returns or raises what it does. For other threads."""
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            self._check_serving()
            self._inbox.append(call)
            self._wake.notify()
        return future.result(timeout_s)

    def drain(self, timeout_s: float | None = None) -> None:
        """Tells the core to open no more sequences; every load that is delivered from now on says so.

        Raises TimeoutError where the step in progress lasts longer.
        """
        self.run(self._drain, timeout_s)

    def _drain(self) -> None:
        self._core.drain()
        self._load = self._core.load

    def _check_serving(self) -> None:
        if self.failed is not None:
            raise Internal("DEFECT", f"{self._name} has failed; the log says why")
        if self._stopping:
            raise Unavailable("DRAINING", f"{self._name} has been stopped")

    def _submit(self, connection: Connection[Item, Result], items: Sequence[Item], arrived_ns: int) -> None:
        if not items:
            return
        endings = tuple(item for item in items if is_ending(item))
        num_new = len(items) - len(endings)
        with self._wake:
            self._check_serving()
            num_queued = self._num_queued_items
            is_full = bool(num_new and num_queued and num_queued + num_new > self._max_queued_items)
            taken = endings if is_full else tuple(items)
            if taken:
                self._num_queued_items += len(taken) - len(endings)
                self._inbox.append(_Arrival(connection, taken, arrived_ns))
                self._wake.notify()
        if is_full:
            raise ResourceExhausted(
                "QUEUE_FULL",
                f"{num_queued} items wait for {self._name}; its limit is {self._max_queued_items}",
                retry_after_ms=QUEUE_RETRY_AFTER_MS,
            )

    def _close(self, connection: Connection[Item, Result]) -> None:
        with self._wake:
            if not connection.closed:
                connection.closed = True
                self._inbox.append(connection)
                self._wake.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            log.critical("%s ends: its core cannot be brought back", self._name, exc_info=True)
            self.failed = error
            self.failure.report(
                error if isinstance(error, WorkerFailed) else WorkerFailed(f"{self._name} has failed: {error!r}")
            )
        finally:
            self._end()

    def _turn(self) -> bool:
        """Takes all that has arrived, then computes a step unless it is held. Returns False once the thread is to end.

        What arrives during a hold ends it: the core is asked again.
        """
        with self._wake:
            if self._pause_s != 0.0 and not (self._inbox or self._stopping):
                self._wake.wait(self._pause_s)
            if self._stopping:
                return False
            inbox, self._inbox, self._num_queued_items = self._inbox, [], 0
        for index, entry in enumerate(inbox):
            try:
                self._take(entry)
            except BaseException:
                with self._wake:
                    self._inbox[:0] = inbox[index + 1 :]  # somebody may wait for a call of theirs
                raise
        self._pause_s = self._core.hold_s if self._core.has_work else None
        if self._pause_s == 0.0:
            self._guard(self._core.step)
        else:
            self._load = self._core.load
        return True

    def _take(self, entry: _Arrival[Item, Result] | Connection[Item, Result] | Callable[[], None]) -> None:
        if isinstance(entry, _Arrival):
            if not entry.connection.closed:
                self._guard(partial(self._core.handle, entry.connection.number, entry.items, entry.arrived_ns), entry)
        elif isinstance(entry, Connection):
            self._guard(partial(self._disconnect, entry.number))
        else:
            entry()

    def _disconnect(self, number: int) -> list[tuple[int, Result]]:
        with self._wake:
            self._connections.pop(number, None)
        self._core.disconnect(number)
        return []

    def _guard(
        self, call: Callable[[], list[tuple[int, Result]]], arrival: _Arrival[Item, Result] | None = None
    ) -> None:
        """Delivers what `call` returns. Where it raises: refuses all in progress and `arrival`, and goes on empty."""
        results: list[tuple[int, Result | Refused]] = []
        try:
            results += call()
        except WorkerFailed:
            raise
        except Exception as error:
            log.exception("%s: its core failed; every sequence is ended", self._name)
            refusal = _refusal(error)
            results += self._core.abandon(refusal)
            if arrival is not None:
                refused = [result.identity for _, result in results if isinstance(result, Refused)]
                left = [item for item in arrival.items if item.identity not in refused and not is_ending(item)]
                results += [(arrival.connection.number, Refused(item.identity, refusal)) for item in left]
        if results or arrival is not None:
            self._load = self._core.load
        self._deliver(results)

    def _deliver(self, results: list[tuple[int, Result | Refused]]) -> None:
        by_connection: dict[int, list[Result | Refused]] = {}
        for number, result in results:
            by_connection.setdefault(number, []).append(result)
        for number, its_results in by_connection.items():
            connection = self._connections.get(number)
            if connection is None or connection.closed:
                continue
            try:
                connection.deliver(its_results)
            except Exception:
                log.exception("%s: a connection takes no results; it is closed", self._name)
                connection.close()

    def _end(self) -> None:
        """Serves waiting `run` calls, and frees what the connections held unless the core is beyond that."""
        with self._wake:
            self._stopping = True
            inbox, self._inbox, self._num_queued_items = self._inbox, [], 0
        for entry in inbox:
            if not isinstance(entry, _Arrival | Connection):
                entry()
        if self.failed is None:
            for number in list(self._connections):
                self._disconnect(number)
            self._load = self._core.load


def _refusal(error: Exception) -> OutriderError:
    """What the peers are told of an exception of the core. torch's OutOfMemoryError is known by name."""
    if isinstance(error, OutriderError):
        return error
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return ResourceExhausted(
            "KV_POOL_FULL", "the device ran out of memory in a step", retry_after_ms=MEMORY_RETRY_AFTER_MS
        )
    return Internal("DEFECT", "the worker failed in a step; its log says how")
