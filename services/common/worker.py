"""What both kinds of worker do on the wire: describe themselves, and join a stream of items to the engine thread.

Owns: the life of one stream's connection. Must not know: which items there are (codecs are given), torch. The engine
is seen through a protocol, so that this module stands on common alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from outrider.v1 import worker_pb2

from services.common import wire
from services.common.errors import Internal, OutriderError, ResourceExhausted, Unavailable
from services.common.item_spans import ItemSpans
from services.common.items import Close, Decode, Open, Propose, Refused, Timings, Tokens, Verify, is_ending
from services.common.logs import work_fields
from services.common.tracing import NO_TRACER, Tracer
from services.common.values import WorkerActivity, WorkerInfo, WorkerLoad

log = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Open | Propose | Verify | Decode | Close)
Request = TypeVar("Request")
Response = TypeVar("Response")


class Connection(Protocol):
    """One stream's side of the engine thread."""

    def submit(self, items: Sequence[Any], arrived_ns: int) -> None:
        """`arrived_ns` is the monotonic time at which the items' message came.

        Raises ResourceExhausted where there is no room; those that end something (is_ending) are taken all the same.
        """
        ...

    def close(self) -> None: ...


class Engine(Protocol):
    """What a servicer sees of services.engine.engine_thread.EngineThread."""

    def connect(self, deliver: Callable[[list[Any]], None]) -> Connection: ...

    @property
    def load(self) -> WorkerLoad: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Worker:
    """A loaded worker."""

    engine: Engine
    info: WorkerInfo
    activity: Callable[[], WorkerActivity] = WorkerActivity


class WorkerState:
    """A worker from its start on: first loading, then ready."""

    def __init__(self, tracer: Tracer = NO_TRACER) -> None:
        self.tracer = tracer
        self._worker: Worker | None = None

    def set_ready(self, worker: Worker) -> None:
        self._worker = worker

    def get(self) -> Worker:
        """Raises Unavailable/STARTING until the model is loaded."""
        if self._worker is None:
            raise Unavailable("STARTING", "the worker is loading its model", retry_after_ms=500)
        return self._worker


class WorkerServicer:
    """outrider.v1.WorkerService."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state

    async def GetWorkerInfo(
        self, request: worker_pb2.GetWorkerInfoRequest, context: object
    ) -> worker_pb2.GetWorkerInfoResponse:
        worker = self._state.get()
        described = dataclasses.replace(worker.info, load=worker.engine.load, activity=worker.activity())
        return wire.info_to_proto(described)


class ItemStream(Generic[Request, Response, Item]):
    """Serves one bidirectional stream: requests become items for the engine, results become responses.

    `decode` gives a request's items and the refusals of malformed ones; `encode` one response for up to
    wire.MAX_ITEMS_A_MESSAGE results, or for none, which is the load alone.
    Ends when the coordinator ends it; whatever the reason, the connection is closed and its sequences are freed.
    """

    def __init__(
        self,
        state: WorkerState,
        decode: Callable[[Request, wire.OpenAssembler], tuple[list[Item], list[Refused]]],
        encode: Callable[[list[Any], WorkerLoad], Response],
    ) -> None:
        self._state = state
        self._decode = decode
        self._encode = encode

    async def serve(self, requests: AsyncIterator[Request]) -> AsyncIterator[Response]:
        worker = self._state.get()
        info = worker.info
        loop = asyncio.get_running_loop()
        outbox = _Outbox(lambda: connection.close())

        def deliver(results: list[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody is left to tell
                loop.call_soon_threadsafe(outbox.put, results, time.monotonic_ns())

        spans = ItemSpans(self._state.tracer)
        connection = worker.engine.connect(deliver)
        opens = wire.OpenAssembler(info.max_sequence_len, info.max_sequences)
        reader = asyncio.create_task(self._read(requests, connection, opens, outbox, spans))
        try:
            while (results := await outbox.take()) is not None:
                spans.left(results)
                _log_refusals(results, spans)
                for start in range(0, max(1, len(results)), wire.MAX_ITEMS_A_MESSAGE):
                    yield self._encode(results[start : start + wire.MAX_ITEMS_A_MESSAGE], worker.engine.load)
        finally:
            connection.close()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(
        self,
        requests: AsyncIterator[Request],
        connection: Connection,
        opens: wire.OpenAssembler,
        outbox: _Outbox,
        spans: ItemSpans,
    ) -> None:
        try:
            async for request in requests:
                arrived_ns = time.monotonic_ns()
                items, refused = self._decode(request, opens)
                spans.arrived(items)
                try:
                    connection.submit(items, arrived_ns)
                except ResourceExhausted as error:
                    refused += [Refused(item.identity, error) for item in items if not is_ending(item)]
                if refused:
                    outbox.put(refused, arrived_ns)
            outbox.end(None)
        except OutriderError as error:
            outbox.end(error)
        except Exception:
            log.exception("a stream of items cannot be read any more")
            outbox.end(Internal("DEFECT", "internal error; the server's log has the detail"))


def _log_refusals(results: list[Any], spans: ItemSpans) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    for result in results:
        if isinstance(result, Refused):
            identity = result.identity
            fields = work_fields(identity.session_id, identity.round, spans.trace_id(identity))
            log.debug("session %s: an item was refused: %s", identity.session_id, result.error.reason, extra=fields)


class _Outbox:
    """Results on their way to one coordinator. Touched by the event loop only.

    A put without results is news too: it has the load sent. Where too much is unread, `overflowed` is called, since
    whoever takes may be held up for as long as the coordinator reads nothing.
    """

    def __init__(self, overflowed: Callable[[], None]) -> None:
        self._overflowed = overflowed
        self._batches: list[tuple[list[Any], int]] = []
        self._num_results = 0
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._error: OutriderError | None = None

    def put(self, results: list[Any], answered_ns: int) -> None:
        if self._error is not None:
            return
        self._batches.append((results, answered_ns))
        self._num_results += len(results)
        if self._num_results > wire.MAX_UNREAD_RESULTS:
            self._batches.clear()
            self._overflowed()
            self.end(ResourceExhausted("QUEUE_FULL", f"more than {wire.MAX_UNREAD_RESULTS} results are unread"))
        self._wake()

    def end(self, error: OutriderError | None) -> None:
        self._ended, self._error = True, self._error or error
        self._wake()

    async def take(self) -> list[Any] | None:
        """All that waits, once there is news; None at the end. Raises the error that ended the stream.

        The results' total time comes to include their wait here.
        """
        while not (self._batches or self._ended):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error:
            raise self._error
        if not self._batches:
            return None
        batches, self._batches, self._num_results = self._batches, [], 0
        now_ns = time.monotonic_ns()
        return [_delayed(result, now_ns - answered_ns) for batch, answered_ns in batches for result in batch]

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _delayed(result: Any, delay_ns: int) -> Any:
    if isinstance(result, Tokens) and not result.done:
        return result  # the next token's time counts from this one's answer, so that the wait is in it already
    timings = result.timings
    total = Timings(timings.queue_ns, timings.forward_ns, timings.total_ns + delay_ns)
    return dataclasses.replace(result, timings=total)
