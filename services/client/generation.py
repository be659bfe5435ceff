"""One generation as its caller sees it: an unbroken stream of chunks, then a result.

Owns: what has been received, and resuming from there. Must not know: how a channel is made, what the text is for.

Invariant: `_tokens` is a prefix of the generation's tokens, each received once, and every chunk yielded starts where
the one before ended. A broken stream is replaced by a new one with the same session_id, request_id, seed and
parameters, and a ResumePoint; what the server repeats is dropped here.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import grpc.aio
from outrider.v1 import coordinator_pb2

from services.client.connections import Connection, Connections
from services.client.values import Chunk, Result, RetryPolicy, Token
from services.client.wire import finish_reason_from_proto, statistics_from_proto, tokens_from_proto
from services.common.errors import DataLoss, Internal, OutriderError, ResourceExhausted, Unavailable
from services.common.rpc import error_from_rpc

_TRANSPORT_REASONS = frozenset({"INTERNAL", "UNKNOWN", "CANCELLED"})
"""Reasons of errors without ErrorInfo: a proxy or the transport ended the stream, not a coordinator."""
_END_OF_STREAM_TIMEOUT_S = 1.0


def is_resumable(error: OutriderError) -> bool:
    """Whether another stream may go on where this error ended one."""
    if isinstance(error, ResourceExhausted):
        return error.retry_after_ms is not None
    return isinstance(error, Unavailable) or (isinstance(error, Internal) and error.reason in _TRANSPORT_REASONS)


class Generation:
    """A running generation. Iterate over it once; `result` is there when the iteration has ended.

    Leaving the iteration early, by `aclose()` or cancellation, ends the generation on the server; its session stays.
    Iterating raises OutriderError for what the server refuses, and for what stays unreachable after the policy's
    retries.
    """

    def __init__(self, connections: Connections, request: coordinator_pb2.GenerateRequest, policy: RetryPolicy) -> None:
        self._connections = connections
        self._request = request
        self._policy = policy
        self._started: coordinator_pb2.GenerationStarted | None = None
        self._tokens: list[Token] = []
        self._texts: list[str] = []
        self._durable_len = 0
        self._reached = False
        self._num_streams = 0
        self._result: Result | None = None
        self._chunks = self._resumed_chunks()

    @property
    def session_id(self) -> str:
        return self._request.session_id

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def seed(self) -> int:
        return self._request.sampling.seed

    @property
    def result(self) -> Result:
        """Raises RuntimeError before the generation has finished."""
        if self._result is None:
            raise RuntimeError("the generation has not finished; iterate over it, or await complete()")
        return self._result

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def complete(self) -> Result:
        """Reads the rest of the stream and returns the result."""
        async with contextlib.aclosing(self):
            async for _ in self._chunks:
                pass
        return self.result

    async def aclose(self) -> None:
        """Ends the stream. Harmless when it has ended."""
        await self._chunks.aclose()

    async def _resumed_chunks(self) -> AsyncGenerator[Chunk, None]:
        num_failures = 0
        while True:
            connection = self._connections.current()
            try:
                async with contextlib.aclosing(self._stream(connection)) as chunks:
                    async for chunk in chunks:
                        num_failures = 0
                        yield chunk
                return
            except OutriderError as error:
                num_failures += 1
                limit = self._policy.max_attempts if self._reached else self._policy.max_attempts_unreached
                if not is_resumable(error) or num_failures >= limit:
                    raise
                self._connections.avoid(connection)
                await asyncio.sleep(self._backoff_s(num_failures, error))

    def _backoff_s(self, num_failures: int, error: OutriderError) -> float:
        """Exponential with full jitter above half, at least what the server asked for."""
        ceiling = min(self._policy.max_backoff_s, self._policy.initial_backoff_s * 2.0 ** (num_failures - 1))
        jittered = ceiling * (0.5 + 0.5 * random.random())  # noqa: S311 - spreads retries, keeps no secret
        return max(jittered, (error.retry_after_ms or 0) / 1e3)

    async def _stream(self, connection: Connection) -> AsyncGenerator[Chunk, None]:
        """The chunks of one call. Ends normally only with the finished response; else raises OutriderError."""
        call = connection.track(connection.stub.Generate(self._next_request(), metadata=connection.metadata))
        timeout_s = self._policy.first_message_timeout_s
        try:
            while True:
                response = await self._read(call, timeout_s)
                timeout_s, self._reached = self._policy.heartbeat_timeout_s, True
                if chunk := self._take(response):
                    yield chunk
                if response.HasField("finished"):
                    self._finish(response.finished)
                    with contextlib.suppress(OutriderError):
                        await self._read(call, _END_OF_STREAM_TIMEOUT_S)
                    return
        finally:
            call.cancel()

    def _next_request(self) -> coordinator_pb2.GenerateRequest:
        self._num_streams += 1
        if self._num_streams == 1:
            return self._request
        request = coordinator_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume.num_received_tokens = len(self._tokens)
        beyond = self._tokens[self._durable_len :]
        request.resume.tokens_beyond_durable.extend(token.token_id for token in beyond)
        return request

    async def _read(
        self,
        call: grpc.aio.UnaryStreamCall[coordinator_pb2.GenerateRequest, coordinator_pb2.GenerateResponse],
        timeout_s: float,
    ) -> coordinator_pb2.GenerateResponse:
        try:
            async with asyncio.timeout(timeout_s):
                response = await call.read()
        except TimeoutError:
            raise Unavailable("STREAM_BROKEN", f"no message from the coordinator for {timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        if not isinstance(response, coordinator_pb2.GenerateResponse):
            raise Unavailable("STREAM_BROKEN", "the coordinator ended the stream before the generation's end")
        return response

    def _take(self, response: coordinator_pb2.GenerateResponse) -> Chunk | None:
        """What is new in a response; None for a heartbeat. Raises DataLoss if tokens before it are missing."""
        if response.HasField("started"):
            self._started = response.started
        self._durable_len = max(self._durable_len, response.durable_len)
        tokens, text = tokens_from_proto(response), response.text
        if tokens:
            num_known = len(self._tokens) - response.token_offset
            if num_known < 0:
                message = f"tokens {len(self._tokens)} to {response.token_offset} of the generation never arrived"
                raise DataLoss("TOKENS_LOST", message)
            text = text[sum(len(token.text) for token in tokens[:num_known]) :]
            tokens = tokens[num_known:]
        if not tokens and not text:
            return None
        offset = len(self._tokens)
        self._tokens.extend(tokens)
        self._texts.append(text)
        return Chunk(text=text, tokens=tokens, offset=offset, durable_len=self._durable_len)

    def _finish(self, finished: coordinator_pb2.GenerationFinished) -> None:
        reason = finish_reason_from_proto(finished.reason)
        if reason is None or self._started is None:
            raise Internal("DEFECT", "the coordinator ended the generation without saying what it was, or why it ended")
        self._result = Result(
            text="".join(self._texts),
            tokens=tuple(self._tokens),
            prompt_token_ids=tuple(self._started.prompt_token_ids),
            finish_reason=reason,
            statistics=statistics_from_proto(finished.statistics),
            session_id=self._started.session_id or self.session_id,
            request_id=self._started.request_id or self.request_id,
            model=self._started.model,
            seed=self._started.seed,
            lossy=self._started.lossy or finished.statistics.lossy,
            num_resumptions=self._num_streams - 1,
        )
