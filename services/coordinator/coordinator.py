"""The coordinator's sessions: runs their generations, gives them to clients, resumes and closes them.

Owns: which generations run here, and who may have a session now. Must not know: protobuf, gRPC.
Invariant: a session has at most one generation here, and while it is being opened it is refused to everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace

from services.common.errors import Aborted, OutriderError, ResourceExhausted, Unavailable
from services.common.service import end_tasks, wait_until
from services.common.session_record import RecordMoved, SessionRecord
from services.common.session_store import SessionStore, unknown_session
from services.common.session_usage import SessionUsage
from services.common.tracing import NO_TRACER, Span, Tracer
from services.coordinator.committer import Committer
from services.coordinator.config import CoordinatorConfig
from services.coordinator.draft_length import AdaptiveLength, DraftLength, FixedLength
from services.coordinator.generation import Generation, Timeouts
from services.coordinator.journal import Journal
from services.coordinator.opening import Opened, SessionOpener, busy, check_same_request, new_trimmer, replay
from services.coordinator.output import TICKS_A_HEARTBEAT, Output, Started
from services.coordinator.placement import Placed, Placement
from services.coordinator.plan import GenerationPlan
from services.coordinator.propose_deadline import ProposeDeadline
from services.coordinator.request import GenerationRequest
from services.coordinator.statistics import GenerationStatistics, StatisticsCollector
from services.coordinator.store_policy import StorePolicy
from services.coordinator.tally import CoordinatorTally, Kind
from services.coordinator.tokenizer_set import TokenizerSet
from services.coordinator.unbroken import unbroken

log = logging.getLogger(__name__)

_MAX_OPENINGS = 3
"""Tries to open a session whose record moves on while it is read; the second is fenced against its old owner."""
_ENDING_S = 0.2
"""What a generation may take to open, or to end once its client is gone, before another request is told to wait."""
_MAX_ASKING = 32
"""Openings and looks at sessions that ask the store at the same moment; the others wait. More would make each of them
later, and leave too few connections to the committer (services.common.redis_client.MIN_CONNECTIONS)."""
_OPENING_S = 5.0
"""What openings may take to end when the coordinator stops: more than the store takes to answer, or to be given up."""


@dataclass(frozen=True, slots=True)
class Stream:
    """A generation as one client reads it. `generation` is None where it had finished before."""

    started: Started
    output: Output
    generation: Generation | None = None


@dataclass(frozen=True, slots=True)
class _Running:
    """A generation that runs here."""

    request_id: str
    owner_key: str
    digest: str
    generation: Generation
    output: Output


class Coordinator:
    """Serves sessions from `start` to `aclose`. All methods belong to one event loop."""

    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        tokenizers: TokenizerSet,
        placement: Placement,
        store: SessionStore,
        committer: Committer,
        usage: SessionUsage,
        tally: CoordinatorTally,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._tracer = tracer
        self._config = config
        self._tally = tally
        self._tokenizers = tokenizers
        self._placement = placement
        self._store = store
        self._store_policy = StorePolicy(store)
        self._committer = committer
        self._usage = usage
        self._opener = SessionOpener(store, usage, placement)
        self._running: dict[str, _Running] = {}
        self._opening: dict[str, str] = {}
        """Sessions that are being opened, or wait for that, and the keys' owners who do."""
        self._gate = asyncio.Semaphore(_MAX_ASKING)
        self._draining = False
        self._hearts: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._placement.start()
        self._committer.start()
        self._hearts = [asyncio.create_task(self._beat_streams()), asyncio.create_task(self._beat_store())]

    async def aclose(self) -> None:
        """Stops at once whatever still runs; streams end with Unavailable MOVED."""
        self._draining = True
        await wait_until(lambda: not self._opening, _OPENING_S)
        moved = Unavailable("MOVED", "this coordinator is stopping; resume at another", retry_after_ms=100)
        await asyncio.gather(*[running.generation.stop(moved) for running in self._running.values()])
        await end_tasks(*self._hearts)
        await self._usage.flush()
        await self._committer.aclose()
        await self._placement.aclose()

    @property
    def num_running(self) -> int:
        """Generations that run here."""
        return len(self._running)

    @property
    def num_streaming(self) -> int:
        """Those of them that have emitted a token. Safe from any thread, as are the next two."""
        return sum(running.generation.has_emitted for running in list(self._running.values()))

    @property
    def num_waiting(self) -> int:
        """Requests that are being opened, and generations without a token."""
        return len(self._opening) + len(self._running) - self.num_streaming

    @property
    def draining(self) -> bool:
        return self._draining

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new generations; returns whether those that run finished within `timeout_s`."""
        self._draining = True
        return await wait_until(lambda: not (self._running or self._opening), timeout_s)

    @contextlib.asynccontextmanager
    async def generate(self, request: GenerationRequest, traceparent: str = "") -> AsyncIterator[Stream]:
        """Starts, resumes or repeats a generation; leaving the context ends it, if it still runs. `traceparent` is the
        caller's span, if it has one.

        Raises what services.coordinator.opening and placement raise, and Unavailable DRAINING, ResourceExhausted
        QUEUE_FULL, Aborted SESSION_BUSY, InvalidArgument REQUEST_MISMATCH, NotFound UNKNOWN_SESSION for another
        owner's session.
        """
        arrived_ns = time.perf_counter_ns()
        self._check_owner(request.session_id, request.owner_key)
        ids = {"session_id": request.session_id, "request_id": request.request_id}
        with self._tracer.start("outrider.generate", traceparent, **ids) as span:
            await self._let_end(request)
            stream = await unbroken(self._open_reserved(request, arrived_ns, span), _end)
            try:
                yield stream
            finally:
                await _end(stream)

    async def get(self, session_id: str, owner_key: str) -> tuple[SessionRecord, bool]:
        """The record, and whether a generation is running, here or elsewhere. Raises NotFound UNKNOWN_SESSION."""
        async with self._gate:
            record = await self._load(session_id, owner_key)
            if record is None:
                raise unknown_session(session_id)
            elsewhere = record.running and record.owner_id != self._store.owner_id
            return record, session_id in self._running or (elsewhere and await self._store.is_alive(record.owner_id))

    async def close_session(self, session_id: str, owner_key: str) -> None:
        """Ends its generation, frees its sequences and leaves a tombstone. Raises NotFound UNKNOWN_SESSION."""
        self._check_owner(session_id, owner_key)
        if running := self._running.get(session_id):
            await running.generation.stop(None)
        async with self._gate:
            await self._store.close(session_id, owner_key)
        self._usage.note(owner_key, session_id, None)

    def _check_owner(self, session_id: str, owner_key: str) -> None:
        """Of a session that is in use here; of all others the store knows it."""
        running = self._running.get(session_id)
        if (running.owner_key if running else self._opening.get(session_id, owner_key)) != owner_key:
            raise unknown_session(session_id)

    async def _load(self, session_id: str, owner_key: str) -> SessionRecord | None:
        try:
            return await self._store.load(session_id, owner_key)
        except OutriderError as error:
            if error.reason == "SESSION_CLOSED":
                return None
            raise

    async def _let_end(self, request: GenerationRequest) -> None:
        """A client that leaves a stream and comes again at once may overtake the news that it left."""
        session_id = request.session_id
        if session_id in self._opening:
            await wait_until(lambda: session_id not in self._opening, _ENDING_S)
        running = self._running.get(session_id)
        if running and running.request_id != request.request_id:
            await running.generation.wait(_ENDING_S)

    @contextlib.contextmanager
    def _reserve(self, request: GenerationRequest) -> Iterator[None]:
        """Holds the session for a request that is being opened. Raises where it may not be."""
        self._check_serving()
        session_id = request.session_id
        self._check_owner(session_id, request.owner_key)
        running = self._running.get(session_id)
        if session_id in self._opening or (running and running.request_id != request.request_id):
            raise busy(session_id)
        if running:
            check_same_request(request, running.digest)
        elif len(self._running) + len(self._opening) >= self._config.max_generations:
            raise ResourceExhausted(
                "QUEUE_FULL",
                f"{self._config.max_generations} generations are running, which is the limit",
                retry_after_ms=1000,
            )
        self._opening[session_id] = request.owner_key
        try:
            yield
        finally:
            del self._opening[session_id]

    async def _open_reserved(self, request: GenerationRequest, arrived_ns: int, span: Span) -> Stream:
        with self._reserve(request), span.child("outrider.open"):
            async with self._gate:
                self._check_serving()
                return await self._open(request, arrived_ns, span)

    def _check_serving(self) -> None:
        if self._draining:
            raise Unavailable("DRAINING", "this coordinator is stopping", retry_after_ms=100)

    async def _open(self, request: GenerationRequest, arrived_ns: int, span: Span) -> Stream:
        if not request.model:  # no target has ever been seen, so nobody knows what the request is
            self._placement.check(request.model)
        if running := self._running.get(request.session_id):
            self._placement.check(request.model)  # what cannot be continued is not ended
            await running.generation.stop(Aborted("OWNERSHIP_LOST", "another stream has taken the generation over"))
        self._check_store(request.session_id)
        for _ in range(_MAX_OPENINGS):
            record = await self._store.load(request.session_id, request.owner_key)
            if record and record.request_id == request.request_id:
                check_same_request(request, record.request_digest)
                if record.finish_reason:
                    return await self._finished(request, record)
            if record is None:
                _check_may_begin(request)
                self._store_policy.check()
            source = await self._source(request) if record is None else None
            try:
                opened = await self._opener.open(request, self._tokenizers.get(request.model), record, source)
            except RecordMoved:
                continue
            try:
                return await self._run(request, opened, arrived_ns, span)
            except BaseException:
                opened.placed.release()
                raise
        raise busy(request.session_id)

    def _check_store(self, session_id: str) -> None:
        """Raises Unavailable where the store is away, or lacks tokens of the session that went out from here."""
        if self._committer.away or self._committer.is_behind(session_id):
            message = "the session store does not answer, or lacks what is still to be written"
            raise Unavailable("STORE_UNAVAILABLE", message, retry_after_ms=500)

    async def _source(self, request: GenerationRequest) -> SessionRecord | None:
        """The record of which the request's new session shall be a copy."""
        if request.fork is None:
            return None
        source_id = request.fork.source_id
        source = await self._store.load(source_id, request.owner_key)
        if source is None:
            raise unknown_session(source_id)
        return source

    async def _finished(self, request: GenerationRequest, record: SessionRecord) -> Stream:
        """The tail of a generation that has ended, from the record alone."""
        output = self._new_output()
        prompt, generated = record.token_ids[: record.prompt_len], record.token_ids[record.prompt_len :]
        trimmer = new_trimmer(request, self._tokenizers.get(request.model), prompt, len(generated))
        origins = record.origins[record.prompt_len :]
        past = await replay(trimmer, generated, origins, record.log_probs, request.num_top_log_probs)
        output.put(past.since(request.resume.num_received_tokens if request.resume else 0), len(generated))
        if record.finish_reason:
            output.end(record.finish_reason, GenerationStatistics.from_json(record.statistics))
        return Stream(_started(request, prompt, record.seed), output)

    async def _run(self, request: GenerationRequest, opened: Opened, arrived_ns: int, span: Span) -> Stream:
        placed, output = opened.placed, self._new_output(len(opened.generated))
        plan = replace(opened.plan, traceparent=span.traceparent)
        tokenizer = self._tokenizers.get(request.model)
        tokens = [*opened.prompt, *opened.generated]
        trimmer = new_trimmer(request, tokenizer, opened.prompt, plan.max_len - plan.prompt_len)
        past = await replay(trimmer, opened.generated, opened.origins, opened.log_probs, plan.num_top_log_probs)
        unread = past.since(request.resume.num_received_tokens if request.resume else 0)
        if unread.token_ids or unread.tail:
            output.put(replace(unread, finish=None), len(opened.generated))
        generation = Generation(
            plan,
            tokens,
            routes=placed.routes,
            trimmer=trimmer,
            journal=Journal(self._committer, plan.session_id, plan.lease_epoch, opened.copy),
            output=output,
            statistics=StatisticsCollector(
                arrived_ns=arrived_ns,
                lossy=plan.verification.lossy,
                num_replaced_tokens=opened.num_replaced_tokens,
                draft=placed.pool.name if placed.pool else "",
                draft_counts=placed.share.counts if placed.share else None,
                tally=self._tally.of(Kind(request.model, placed.pool.name if placed.pool else "")),
            ),
            timeouts=Timeouts(
                placed.share.deadline if placed.share else ProposeDeadline(self._config.propose_timeout_s),
                self._config.target_timeout_s,
                self._config.target_retry_s,
            ),
            length=_draft_length(plan, placed),
            finish=past.finish,
            span=span,
        )
        running = _Running(request.request_id, request.owner_key, request.digest, generation, output)
        self._running[request.session_id] = running
        generation.start().add_done_callback(lambda _: self._forget(request, running, len(tokens)))
        return Stream(_started(request, opened.prompt, plan.sampling.seed), output, generation)

    def _forget(self, request: GenerationRequest, running: _Running, num_tokens: int) -> None:
        if self._running.get(request.session_id) is running:
            del self._running[request.session_id]
            self._usage.note(request.owner_key, request.session_id, num_tokens)

    def _new_output(self, durable_len: int = 0) -> Output:
        return Output(
            max_unread_tokens=self._config.max_unread_tokens,
            slow_client_s=self._config.slow_client_s,
            durable_len=durable_len,
        )

    async def _beat_streams(self) -> None:
        """Signs of life to clients whose streams are quiet."""
        while True:
            await asyncio.sleep(self._config.heartbeat_ms / 1e3 / TICKS_A_HEARTBEAT)
            for running in self._running.values():
                running.output.tick()

    async def _beat_store(self) -> None:
        """Signs of life in the store, what sessions hold, and a look at the store, which a failover may have replaced;
        one that is away is noticed by the commits."""
        while True:
            with contextlib.suppress(OutriderError):
                await self._store.heartbeat(3 * self._config.heartbeat_ms)
                await self._usage.flush()
            with contextlib.suppress(OutriderError):
                await self._store_policy.look()
            await asyncio.sleep(self._config.heartbeat_ms / 1e3)


async def _end(stream: Stream) -> None:
    """Nobody reads the stream any more."""
    if stream.generation is not None:
        await stream.generation.stop(Aborted("OWNERSHIP_LOST", "the client went away"))


def _check_may_begin(request: GenerationRequest) -> None:
    """Raises NotFound UNKNOWN_SESSION where the request would begin a session that it takes to exist.

    A client that has received something holds what it needs to go on (services.coordinator.turns.adopted_tokens).
    """
    has_received = request.resume and (request.resume.num_received_tokens or request.resume.num_prompt_tokens)
    if request.continue_session and not (request.fork or has_received):
        raise unknown_session(request.session_id)


def _draft_length(plan: GenerationPlan, placed: Placed) -> DraftLength:
    if plan.adaptive and placed.share:
        return AdaptiveLength(placed.share.policy, plan.num_draft_tokens)
    return FixedLength(plan.num_draft_tokens)


def _started(request: GenerationRequest, prompt: tuple[int, ...], seed: int) -> Started:
    return Started(
        session_id=request.session_id,
        request_id=request.request_id,
        model=request.model,
        seed=seed,
        prompt_token_ids=prompt,
        lossy=request.verification.lossy and not request.sampling.greedy,
    )
