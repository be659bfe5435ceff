"""A generation's output on its way to one client.

Owns: what waits unread, when that is too much, heartbeats, and how the stream ends. Must not know: protobuf, workers.
One writer (the generation) and one reader (the servicer), both on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.common.errors import Aborted, OutriderError
from services.common.values import FinishReason
from services.coordinator.statistics import GenerationStatistics
from services.coordinator.trim import Trimmed

TICKS_A_HEARTBEAT = 5


@dataclass(frozen=True, slots=True)
class Started:
    """Who a generation is. `prompt_token_ids` are the tokens that it continues."""

    session_id: str
    request_id: str
    model: str
    seed: int
    prompt_token_ids: tuple[int, ...]
    lossy: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """What became durable since the last chunk; without tokens and finish it is a heartbeat."""

    kept: tuple[Trimmed, ...]
    durable_len: int
    finish: FinishReason | None = None
    statistics: GenerationStatistics | None = None


class Output:
    """Unread tokens of one stream. Iterating gives chunks until the generation finishes, or raises why it failed.

    `durable_len` tokens are durable before anything is put.
    """

    def __init__(self, *, max_unread_tokens: int, slow_client_s: float, durable_len: int = 0) -> None:
        self._max_unread_tokens = max_unread_tokens
        self._slow_client_s = slow_client_s
        self._kept: list[Trimmed] = []
        self._last: Trimmed | None = None
        self._num_unread_tokens = 0
        self._durable_len = durable_len
        self._heartbeat = False
        self._num_quiet_ticks = 0
        self._finish: FinishReason | None = None
        self._statistics: GenerationStatistics | None = None
        self._error: OutriderError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    @property
    def full(self) -> bool:
        """Whether rounds must pause."""
        return self._num_unread_tokens >= self._max_unread_tokens

    def put(self, kept: Trimmed, durable_len: int) -> None:
        """Hands over tokens that are durable. Those that finish the generation wait for `end`, to go out with it."""
        self._durable_len = durable_len
        if kept.finish is not None:
            self._last = kept
            return
        self._kept.append(kept)
        self._num_unread_tokens += len(kept.token_ids)
        _wake(self._reader)

    def end(self, finish: FinishReason, statistics: GenerationStatistics) -> None:
        """Nothing more follows what was put."""
        if self._last is not None:
            self._kept.append(self._last)
        self._finish, self._statistics = finish, statistics
        _wake(self._reader)

    def fail(self, error: OutriderError) -> None:
        """Ends the stream with an error behind what was put; the first error stays."""
        self._error = self._error or error
        _wake(self._reader)
        _wake(self._writer)

    def tick(self) -> None:
        """To be called TICKS_A_HEARTBEAT times in the heartbeat's interval: a stream that was quiet for that long gets
        a heartbeat."""
        self._num_quiet_ticks += 1
        if self._num_quiet_ticks > TICKS_A_HEARTBEAT:  # the first of them came sooner than a tick after the message
            self._heartbeat = True
            _wake(self._reader)

    async def writable(self) -> None:
        """Waits while the output is full. Raises Aborted SLOW_CLIENT when that takes too long."""
        if not self.full:
            return
        self._writer = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._slow_client_s):
                await self._writer
        except TimeoutError:
            raise Aborted(
                "SLOW_CLIENT",
                f"{self._num_unread_tokens} tokens were left unread for {self._slow_client_s:g} s; resume to go on",
            ) from None

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while True:
            while not (self._kept or self._finish or self._error or self._heartbeat):
                self._reader = asyncio.get_running_loop().create_future()
                await self._reader
            kept, self._kept = tuple(self._kept), []
            self._num_unread_tokens = 0
            self._heartbeat, self._num_quiet_ticks = False, 0
            _wake(self._writer)
            finish = self._finish
            if kept or finish or not self._error:
                yield Chunk(kept, self._durable_len, finish, self._statistics)
            if finish:
                return
            if self._error and not self._kept:
                raise self._error


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
