"""A scripted CoordinatorService in the test's own process: each Generate call plays the next script.

Owns: canned streams, and what was requested. It has no decode loop; the real one is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common.errors import NotFound, OutriderError
from services.common.rpc import MAX_PUBLIC_MESSAGE_BYTES, GrpcServer, ServerLimits

Script = Callable[[pb.GenerateRequest], AsyncIterator[pb.GenerateResponse]]
SERVICE = pb.DESCRIPTOR.services_by_name["CoordinatorService"]
DRAFT, TARGET = sampling_pb2.TOKEN_ORIGIN_DRAFT, sampling_pb2.TOKEN_ORIGIN_TARGET
WORDS = ("One", " two", " three", " four", " five", " six")


def started(request: pb.GenerateRequest) -> pb.GenerateResponse:
    identity = pb.GenerationStarted(
        session_id=request.session_id,
        request_id=request.request_id,
        model="fake",
        seed=request.sampling.seed,
        prompt_token_ids=[7, 8],
    )
    return pb.GenerateResponse(started=identity)


def tokens(first: int, count: int, *, durable_len: int | None = None, num_accepted: int = 0) -> pb.GenerateResponse:
    """Tokens 100 + i with the text WORDS[i]; the first `num_accepted` of them are the draft's."""
    words = WORDS[first : first + count]
    return pb.GenerateResponse(
        text="".join(words),
        text_lens=[len(word) for word in words],
        token_ids=[100 + first + i for i in range(count)],
        origins=[DRAFT if i < num_accepted else TARGET for i in range(count)],
        token_offset=first,
        durable_len=first + count if durable_len is None else durable_len,
    )


def finished(num_tokens: int, text: str = "", overhead_ms: tuple[float, ...] = (0.5,)) -> pb.GenerateResponse:
    statistics = pb.GenerationStatistics(
        num_prompt_tokens=2,
        num_generated_tokens=num_tokens,
        num_drafts=2,
        num_draft_tokens=4,
        num_accepted_tokens=3,
        num_accepted_tokens_per_pos=[2, 1],
        num_verified_tokens_per_pos=[2, 2],
        num_rounds=3,
        overhead_ms=overhead_ms,
    )
    done = pb.GenerationFinished(reason=pb.FINISH_REASON_LENGTH, statistics=statistics)
    return pb.GenerateResponse(finished=done, text=text, durable_len=num_tokens)


def play(*parts: pb.GenerateResponse | OutriderError | float, start: bool = True) -> Script:
    """A script of responses, pauses in seconds, and an error to end with."""

    async def script(request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if start:
            yield started(request)
        for part in parts:
            if isinstance(part, float):
                await asyncio.sleep(part)
            elif isinstance(part, OutriderError):
                raise part
            else:
                yield part

    return script


def whole(num_tokens: int = 6) -> Script:
    """All tokens, two a response, then the end."""
    pairs = [tokens(i, min(2, num_tokens - i), num_accepted=1) for i in range(0, num_tokens, 2)]
    return play(*pairs, finished(num_tokens))


class FakeCoordinator:
    """Plays `scripts` one a call; the last one again and again."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.requests: list[pb.GenerateRequest] = []
        self.cancelled = asyncio.Event()
        self.num_status_calls = 0
        self.status: Callable[[int], pb.GetClusterStatusResponse] = lambda num_calls: pb.GetClusterStatusResponse()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            async for response in script(request):
                yield response
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def GetSession(self, request: pb.GetSessionRequest, context: Any) -> pb.GetSessionResponse:
        if request.session_id != "known":
            raise NotFound("UNKNOWN_SESSION", f"there is no session {request.session_id}", field="session_id")
        return pb.GetSessionResponse(session_id="known", model="fake", token_ids=[7, 8, 100], prompt_len=2)

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Any) -> pb.CloseSessionResponse:
        return pb.CloseSessionResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        model = pb.ServedModel(
            name="fake", digest="d", drafter="ngram", vocab_size=512, max_sequence_len=64, ready=True
        )
        return pb.ListModelsResponse(models=[model])

    async def GetClusterStatus(self, request: pb.GetClusterStatusRequest, context: Any) -> pb.GetClusterStatusResponse:
        self.num_status_calls += 1
        return self.status(self.num_status_calls)


@contextlib.asynccontextmanager
async def serving(fake: FakeCoordinator) -> AsyncIterator[str]:
    """Serves `fake` on a free loopback port; yields its address."""
    server = GrpcServer("127.0.0.1", 0, limits=ServerLimits(MAX_PUBLIC_MESSAGE_BYTES), reflect=False, stop_grace_s=0.0)
    server.add(SERVICE, fake)
    async with server:
        yield f"127.0.0.1:{server.port}"
