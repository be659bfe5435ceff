"""One coordinator's connection to one worker: a single stream that carries the items of all generations.

Owns: connecting and reconnecting, gathering items into messages, handing each result to the lane that waits for it.
Must not know: what items mean, sessions beyond their identity. Used by one event loop.
Invariant: when a stream ends, every lane on it has failed with Unavailable STREAM_BROKEN before another stream begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import grpc
import grpc.aio
from outrider.v1 import draft_pb2_grpc, target_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.common import rpc_errors, wire, wire_draft, wire_target
from services.common.channels import Channels
from services.common.errors import DeadlineExceeded, FailedPrecondition, Internal, OutriderError, Unavailable
from services.common.items import Close, DraftItem, DraftResult, Identity, Open, TargetItem, TargetResult
from services.common.service import end_tasks
from services.common.values import PROTOCOL_VERSION, WorkerInfo, WorkerLoad

log = logging.getLogger(__name__)
ItemT = TypeVar("ItemT", bound=TargetItem | DraftItem)
ResultT = TypeVar("ResultT", bound=TargetResult | DraftResult)

MAX_PREFIX_TOKENS_A_MESSAGE = 200_000
"""Opens are spread over messages so that none nears the 4 MB cap; a single longer prefix travels alone."""

_DESCRIBE_TIMEOUT_S = 2.0
_MAX_BACKOFF_S = 2.0
_SWEEP_S = 0.05
_REFRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Codec(Generic[ItemT, ResultT]):
    """What differs between the two roles: the stream's method and its messages."""

    role: str
    open_stream: Callable[[grpc.aio.Channel], Any]
    encode: Callable[[Sequence[ItemT]], Any]
    decode: Callable[[Any], Sequence[ResultT]]


TARGET_CODEC: Codec[TargetItem, TargetResult] = Codec(
    "target",
    lambda channel: target_pb2_grpc.TargetServiceStub(channel).TargetStream(),
    wire_target.encode_items,
    wire_target.decode_results,
)
DRAFT_CODEC: Codec[DraftItem, DraftResult] = Codec(
    "draft",
    lambda channel: draft_pb2_grpc.DraftServiceStub(channel).DraftStream(),
    wire_draft.encode_items,
    wire_draft.decode_results,
)


class Lane(Generic[ItemT, ResultT]):
    """One opened sequence's share of a link. Broken for good when its stream ends."""

    def __init__(self, link: WorkerLink[ItemT, ResultT], identity: Identity) -> None:
        self._link = link
        self._key = _key(identity)
        self._results: deque[ResultT] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: OutriderError | None = None
        self.deadline = 0.0
        """When the present wait times out, by the loop's clock; meaningful while somebody waits."""
        self.on_result: Callable[[ResultT], bool] | None = None
        """Sees each result first; True keeps it from `receive`."""
        self.on_broken: Callable[[OutriderError], None] | None = None

    @property
    def waiting(self) -> bool:
        return self._waiter is not None

    def send(self, *items: ItemT) -> None:
        """Queues items behind all others of the link. Silently dropped on a broken lane: `receive` tells."""
        if self._error is None:
            self._link.enqueue(items)

    async def receive(self, timeout_s: float) -> ResultT:
        """The next result. Raises Unavailable STREAM_BROKEN, or DeadlineExceeded after about `timeout_s`."""
        while not self._results:
            if self._error is not None:
                raise self._error
            loop = asyncio.get_running_loop()
            self._waiter, self.deadline = loop.create_future(), loop.time() + timeout_s
            try:
                await self._waiter
            except DeadlineExceeded:
                if not self._results:  # else it came before this task woke up
                    raise
            finally:
                self._waiter = None
        return self._results.popleft()

    def close(self, identity: Identity) -> None:
        """Tells the worker to close the sequence, and forgets the lane."""
        if self._error is None:
            self._link.enqueue((cast(ItemT, Close(identity)),))
            self._link.forget(self._key)

    def deliver(self, result: ResultT) -> None:
        if self.on_result is not None and self.on_result(result):
            return
        self._results.append(result)
        self._wake()

    def expire(self) -> None:
        """Ends the present wait with DeadlineExceeded."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(DeadlineExceeded("DEADLINE", f"{self._link} did not answer in time"))

    def break_off(self, error: OutriderError) -> None:
        self._error = error
        self._results.clear()
        self._wake()
        if self.on_broken is not None:
            self.on_broken(error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class WorkerLink(Generic[ItemT, ResultT]):
    """A worker's address, and the stream to it while it lives. `start` and `aclose` once each."""

    def __init__(self, address: str, codec: Codec[ItemT, ResultT], channels: Channels | None = None) -> None:
        """Each time it connects over a new channel of `channels`; without them in plaintext."""
        self.address = address
        self._codec = codec
        self._channels = channels or Channels()
        self._lanes: dict[tuple[str, int, int], Lane[ItemT, ResultT]] = {}
        self._outgoing: list[ItemT] = []
        self._outgoing_waiter: asyncio.Future[None] | None = None
        self._info: WorkerInfo | None = None
        self._load = WorkerLoad()
        self._num_foreign = 0
        self._heard_s = 0.0
        self._up = asyncio.Event()
        self._trouble: OutriderError = Unavailable("STARTING", f"{self} is not connected yet", retry_after_ms=500)
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: grpc.aio.Channel | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when the link comes up or goes down, and when its worker begins to drain."""
        self.on_broken: Callable[[], None] = lambda: None
        """Called when a stream has ended otherwise than by `aclose`."""

    def __str__(self) -> str:
        return f"{self._codec.role} worker {self.address}"

    @property
    def info(self) -> WorkerInfo | None:
        """What the worker told of itself when it was last connected."""
        return self._info

    @property
    def load(self) -> WorkerLoad:
        return self._load

    @property
    def num_foreign(self) -> int:
        """Sequences on the worker that are not this link's, as of its last load."""
        return self._num_foreign

    @property
    def up(self) -> bool:
        return self._up.is_set()

    @property
    def trouble(self) -> OutriderError:
        """Why the link is not up."""
        return self._trouble

    @property
    def num_lanes(self) -> int:
        """Sequences that are open on it."""
        return len(self._lanes)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._sweep())]

    async def aclose(self) -> None:
        await end_tasks(*self._tasks)

    async def wait_up(self, timeout_s: float) -> bool:
        """Whether the link was up within `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        return self.up

    async def describe(self, timeout_s: float = _DESCRIBE_TIMEOUT_S) -> WorkerInfo:
        """Asks the worker what it is and how it is doing. Raises what ails the link, or the call."""
        if not self.up or self._channel is None:
            raise self._trouble
        return await _ask(self._channel, timeout_s)

    def open_lane(self, identity: Identity) -> Lane[ItemT, ResultT]:
        """A lane for the sequence that is about to be opened. Raises what ails the link if it is not up."""
        if not self.up:
            raise self._trouble
        lane = Lane(self, identity)
        self._lanes[_key(identity)] = lane
        return lane

    def enqueue(self, items: Sequence[ItemT]) -> None:
        self._outgoing += items
        if self._outgoing_waiter is not None and not self._outgoing_waiter.done():
            self._outgoing_waiter.set_result(None)

    def forget(self, key: tuple[str, int, int]) -> None:
        self._lanes.pop(key, None)

    async def _run(self) -> None:
        backoff_s = 0.1
        while True:
            try:
                async with self._channels.open(self.address) as channel:
                    self._channel = channel
                    self._info = await self._describe(channel)
                    backoff_s = 0.1
                    await self._stream(channel)
            except OutriderError as error:
                if error.reason != self._trouble.reason:
                    log.warning("%s: %s", self, error)
                self._trouble = error
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  # jitter
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _describe(self, channel: grpc.aio.Channel) -> WorkerInfo:
        info = await _ask(channel, _DESCRIBE_TIMEOUT_S)
        if info.role != self._codec.role:
            raise FailedPrecondition("MODEL_MISMATCH", f"{self} says that its role is {info.role!r}")
        if info.protocol_version != PROTOCOL_VERSION:
            raise FailedPrecondition(
                "MODEL_MISMATCH", f"{self} speaks protocol {info.protocol_version}, not {PROTOCOL_VERSION}"
            )
        return info

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        """Runs one stream to its end. Always raises why it ended."""
        call = self._codec.open_stream(channel)
        writer = asyncio.create_task(self._write(call))
        refresher = asyncio.create_task(self._refresh(channel))
        self._note_load(self._info.load if self._info else WorkerLoad())
        self._up.set()
        log.info("%s: connected", self)
        self.on_change()
        error: OutriderError = Unavailable("STREAM_BROKEN", f"{self} ended the stream", retry_after_ms=500)
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                _check_decoded(response)
                self._note_load(wire.load_from_proto(response.load))
                for result in self._codec.decode(response):
                    lane = self._lanes.get(_key(result.identity))
                    if lane is not None:
                        lane.deliver(result)
        except grpc.aio.AioRpcError as failure:
            error = rpc_errors.error_from_rpc(failure)
        except OutriderError as failure:  # no message of the protocol
            error = failure
        except asyncio.CancelledError:
            if not writer.done():  # else it was the writer that ended the stream
                raise
        finally:
            self._up.clear()
            writer.cancel()
            refresher.cancel()
            call.cancel()
            await asyncio.gather(writer, refresher, return_exceptions=True)
            self._break_lanes(Unavailable("STREAM_BROKEN", f"{self}: {error.message}", retry_after_ms=500))
            self.on_change()
        self.on_broken()
        raise error

    def _note_load(self, load: WorkerLoad) -> None:
        began_to_drain = load.draining and not self._load.draining
        self._load, self._heard_s = load, asyncio.get_running_loop().time()
        self._num_foreign = max(0, load.num_sequences - len(self._lanes))
        if began_to_drain:
            self.on_change()

    async def _refresh(self, channel: grpc.aio.Channel) -> None:
        """Asks a worker for its load that has sent none for a while: a quiet one may have been filled by others."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            if asyncio.get_running_loop().time() - self._heard_s < _REFRESH_S:
                continue
            with contextlib.suppress(OutriderError):  # a worker that is gone ends the stream
                self._note_load((await _ask(channel, _DESCRIBE_TIMEOUT_S)).load)

    def _break_lanes(self, error: OutriderError) -> None:
        lanes, self._lanes = self._lanes, {}
        self._outgoing.clear()
        for lane in lanes.values():
            lane.break_off(error)

    async def _write(self, call: Any) -> None:
        """Sends what has gathered; the loop runs once before each message: what is ready together goes together.

        A defect ends the stream, which its lanes notice; were it to end the writer alone, they would wait in vain.
        """
        loop = asyncio.get_running_loop()
        try:
            while True:
                if not self._outgoing:
                    self._outgoing_waiter = loop.create_future()
                    await self._outgoing_waiter
                await asyncio.sleep(0)
                items, self._outgoing = self._outgoing, []
                for group in _message_groups(items):
                    await call.write(self._codec.encode(group))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reader tells
        except Exception:
            log.exception("%s: cannot be written to", self)
            call.cancel()

    async def _sweep(self) -> None:
        """Ends waits that took too long; one timer for all of them."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = loop.time()
            for lane in list(self._lanes.values()):
                if lane.waiting and lane.deadline < now:
                    lane.expire()


async def _ask(channel: grpc.aio.Channel, timeout_s: float) -> WorkerInfo:
    stub = worker_pb2_grpc.WorkerServiceStub(channel)
    try:
        response = await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise rpc_errors.error_from_rpc(error) from error
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        raise Unavailable("STREAM_BROKEN", "the channel was closed meanwhile") from None
    _check_decoded(response)
    return wire.info_from_proto(response)


def _check_decoded(response: object) -> None:
    """gRPC gives None for bytes that are no such message. Raises Internal UNDECODABLE."""
    if response is None:
        raise Internal("UNDECODABLE", "the bytes received are no message of the protocol")


def _key(identity: Identity) -> tuple[str, int, int]:
    return identity.session_id, identity.lease_epoch, identity.attempt


def _message_groups(items: list[ItemT]) -> Iterator[list[ItemT]]:
    group: list[ItemT] = []
    num_tokens = 0
    for item in items:
        size = len(item.prefix) if isinstance(item, Open) else 0
        too_long = size and num_tokens + size > MAX_PREFIX_TOKENS_A_MESSAGE
        if group and (too_long or len(group) == wire.MAX_ITEMS_A_MESSAGE):
            yield group
            group, num_tokens = [], 0
        group.append(item)
        num_tokens += size
    if group:
        yield group
