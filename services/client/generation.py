"""One generation as its caller sees it: an unbroken stream of chunks, then a result.

Owns: what has been received, and resuming from there. Must not know: how a channel is made, what the text is for.

Invariant: `_tokens` is a prefix of the generation's tokens, each received once, and every chunk yielded starts where
the one before ended. A broken stream is replaced by a new one with the same session_id, request_id, seed and
parameters, and a ResumePoint; what the server repeats is dropped here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import grpc
import grpc.aio
import tenacity
from outrider.v1 import coordinator_pb2

from services.client.connections import Connection, Connections, another_may_answer
from services.client.values import Chunk, Result, RetryPolicy, Token
from services.client.wire import finish_reason_from_proto, statistics_from_proto, tokens_from_proto
from services.common.errors import Aborted, DataLoss, Internal, OutriderError, ResourceExhausted, Unavailable
from services.common.patience import patience
from services.common.rpc_errors import error_from_rpc

_CROWDED, _TOO_LARGE = "RESOURCE_EXHAUSTED", "larger than max"
"""Reason of an exhaustion without ErrorInfo, and what its text has where the message was too large: all others come
from a server with more calls at once than it looks at."""
_END_OF_STREAM_TIMEOUT_S = 1.0
_MAX_OWNERSHIP_LOSSES = 3
"""Of one generation. A stream of its own that it had given up for dead may wake and take it; two clients that go on
taking one generation from each other shall end."""

_Call = grpc.aio.UnaryStreamCall[coordinator_pb2.GenerateRequest, coordinator_pb2.GenerateResponse]


def is_resumable(error: BaseException) -> bool:
    """Whether another stream may go on where this error ended one. A full or a busy server says so if it is to be asked
    again."""
    if isinstance(error, ResourceExhausted):
        crowded = error.reason == _CROWDED and _TOO_LARGE not in error.message
        return crowded or error.retry_after_ms is not None
    if isinstance(error, Aborted) and error.reason == "SESSION_BUSY":
        return error.retry_after_ms is not None
    return another_may_answer(error)


class Generation:
    """A running generation. Iterate over it once; `result` is there when the iteration has ended.

    Leaving the iteration early, by `aclose()` or cancellation, ends the generation on the server; its session stays.
    So does dropping it: nothing that it holds refers back to it.
    Iterating raises OutriderError for what the server refuses, and for what stays unreachable after the policy's
    retries.
    """

    def __init__(self, connections: Connections, request: coordinator_pb2.GenerateRequest, policy: RetryPolicy) -> None:
        self._stream = _ResumedStream(connections, request, policy)
        self._chunks = self._stream.chunks()

    @property
    def session_id(self) -> str:
        """Of a fork, the new session's once the stream has begun, before that its source's."""
        return self._stream.session_id

    @property
    def request_id(self) -> str:
        return self._stream.request_id

    @property
    def seed(self) -> int:
        return self._stream.seed

    @property
    def result(self) -> Result:
        """Raises RuntimeError before the generation has finished."""
        if self._stream.result is None:
            raise RuntimeError("the generation has not finished; iterate over it, or await complete()")
        return self._stream.result

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


class _ResumedStream:
    """What a generation has received, and the call that it comes from."""

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
        self._num_offered = 0
        self._num_ownership_losses = 0
        self._connection: Connection | None = None
        self._call: _Call | None = None
        self.result: Result | None = None
        self._retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(self._may_resume),
            stop=self._has_given_up,
            wait=self._backoff_s,
            retry_error_callback=_raise_given_up,
        )

    @property
    def session_id(self) -> str:
        return self._started.session_id if self._started else self._request.session_id

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def seed(self) -> int:
        return self._request.sampling.seed

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """To be called once."""
        try:
            chunk: Chunk | None
            while (chunk := await self._retrying(self._next_chunk)) is not None:
                yield chunk
        finally:
            self._end_call()

    async def _next_chunk(self) -> Chunk | None:
        """The next chunk of the present stream, or of a new one; None behind the last.

        Raises OutriderError, having ended the stream; the next call begins a new one, elsewhere if there is elsewhere.
        """
        try:
            while self.result is None:
                response = await self._read()
                chunk = self._take(response)
                if response.HasField("finished"):
                    self._finish(response.finished)
                    await self._read_end()
                if chunk is not None:
                    return chunk
            return None
        except OutriderError as error:
            self._end_call()
            self._note_losses(error)
            raise

    def _note_losses(self, error: OutriderError) -> None:
        if self._connection is not None and isinstance(error, Unavailable | Internal):
            self._connections.failed(self._connection)
        if isinstance(error, Aborted) and error.reason == "OWNERSHIP_LOST":
            self._num_ownership_losses += 1
        if isinstance(error, DataLoss):
            self._durable_len = 0  # the record is gone, or older than it was: offer all there is, once

    def _may_resume(self, error: BaseException) -> bool:
        if isinstance(error, DataLoss):
            return error.reason == "TOKENS_LOST" and self._num_offered < len(self._tokens)
        if isinstance(error, Aborted) and self._num_streams > 1:  # it meets a stream of its own that is not quite dead
            lost = error.reason == "OWNERSHIP_LOST" and self._num_ownership_losses <= _MAX_OWNERSHIP_LOSSES
            return lost or error.reason == "SESSION_BUSY"
        return is_resumable(error)

    def _has_given_up(self, state: tenacity.RetryCallState) -> bool:
        limit = self._policy.max_attempts if self._reached else self._policy.max_attempts_unreached
        error = state.outcome.exception() if state.outcome else None
        told_when = isinstance(error, OutriderError) and error.retry_after_ms is not None
        outlasts = told_when and self._started is not None and state.idle_for < self._policy.max_told_wait_s
        return state.attempt_number >= limit and not outlasts

    def _backoff_s(self, state: tenacity.RetryCallState) -> float:
        """Exponential with jitter, at least what the server asked for."""
        policy, error = self._policy, state.outcome.exception() if state.outcome else None
        ceiling_s = min(policy.max_backoff_s, policy.initial_backoff_s * 2.0 ** (state.attempt_number - 1))
        asked_ms = (error.retry_after_ms or 0) if isinstance(error, OutriderError) else 0
        return max(tenacity.wait_random(ceiling_s / 2, ceiling_s)(state), asked_ms / 1e3)

    def _begin_call(self) -> _Call:
        self._connection = connection = self._connections.choose(self._request.session_id, after=self._connection)
        return connection.track(connection.stub.Generate(self._next_request(), metadata=connection.metadata))

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def _next_request(self) -> coordinator_pb2.GenerateRequest:
        self._num_streams += 1
        if self._num_streams == 1:
            return self._request
        request = coordinator_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.resume.num_received_tokens = len(self._tokens)
        request.resume.num_prompt_tokens = len(self._started.prompt_token_ids) if self._started else 0
        beyond = self._tokens[self._durable_len :]
        self._num_offered = len(beyond)
        request.resume.tokens_beyond_durable.extend(token.token_id for token in beyond)
        return request

    async def _read(self) -> coordinator_pb2.GenerateResponse:
        """The next message; of a new stream if there is none."""
        if is_first := self._call is None:
            self._call, timeout_s = self._begin_call(), self._policy.first_message_timeout_s
        else:
            timeout_s = self._policy.heartbeat_timeout_s
        try:
            async with patience(timeout_s):
                response = await self._call.read()
        except TimeoutError:
            raise Unavailable("STREAM_BROKEN", f"no message from the coordinator for {timeout_s:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None
        if not isinstance(response, coordinator_pb2.GenerateResponse):
            raise Unavailable("STREAM_BROKEN", "the coordinator ended the stream before the generation's end")
        self._reached = True
        if is_first and self._connection is not None:
            self._connections.succeeded(self._connection)
        return response

    async def _read_end(self) -> None:
        """Lets the stream end by itself, so that the coordinator does not see it cancelled."""
        if self._call is not None:
            with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):
                async with asyncio.timeout(_END_OF_STREAM_TIMEOUT_S):
                    await self._call.read()

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
        self.result = Result(
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


def _raise_given_up(state: tenacity.RetryCallState) -> Chunk | None:
    """The last error, saying that it was the last of several."""
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, OutriderError):
        raise RuntimeError("tenacity gave up without an error")
    message = f"{error.message} (given up after {state.attempt_number} attempts in a row)"
    raise type(error)(
        error.reason, message, field=error.field, retry_after_ms=error.retry_after_ms, metadata=error.metadata
    ) from error
