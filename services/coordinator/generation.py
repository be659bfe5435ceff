"""One generation: the draft-verify loop.

Owns: the order propose, verify, trim, commit, emit, and the choice between a round and plain decoding.
Must not know: protobuf, Redis, how a session was found. Everything it needs is handed to it.
Invariant: tokens are emitted in order, once, and only when the journal releases them: as soon as they are stored, or
while the store is away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.common.errors import NEWEST_EPOCH, Internal, OutriderError, Unavailable
from services.common.items import Tokens
from services.common.session_record import KvHandle
from services.common.tracing import NO_SPAN, Span
from services.common.values import FinishReason, TokenOrigin
from services.coordinator.draft_length import DraftLength
from services.coordinator.draft_sequence import DraftRoute, DraftSequence
from services.coordinator.journal import Journal
from services.coordinator.output import Output
from services.coordinator.plan import GenerationPlan
from services.coordinator.propose_deadline import ProposeDeadline
from services.coordinator.statistics import GenerationStatistics, StatisticsCollector
from services.coordinator.target_sequence import TargetLost, TargetRoute, TargetSequence
from services.coordinator.trim import Trimmed, Trimmer, pack_log_probs

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a generation waits for its workers."""

    propose: ProposeDeadline
    target_s: float
    target_retry_s: float


@dataclass(frozen=True, slots=True)
class Routes:
    """The ways to the workers that a generation is placed on; closed by it in the end."""

    target: TargetRoute
    draft: DraftRoute | None


class Generation:
    """Runs from `start` until it finishes, fails or is stopped; then its sequences are freed, its record is released.

    `tokens` are the committed ones, the prompt included; `trimmer` has seen those of them that were generated before.
    With `finish` they end the generation already, and only that is left to be recorded.
    """

    def __init__(
        self,
        plan: GenerationPlan,
        tokens: list[int],
        *,
        routes: Routes,
        trimmer: Trimmer,
        journal: Journal,
        output: Output,
        statistics: StatisticsCollector,
        timeouts: Timeouts,
        length: DraftLength,
        finish: FinishReason | None = None,
        span: Span = NO_SPAN,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._plan = plan
        self._tokens = tokens
        self._trimmer = trimmer
        self._journal = journal
        self._output = output
        self._statistics = statistics
        self._span = span
        self._target = TargetSequence(
            routes.target, plan, tokens, timeout_s=timeouts.target_s, retry_s=timeouts.target_retry_s
        )
        self._draft = DraftSequence(
            routes.draft, plan, tokens, deadline=timeouts.propose, on_ready=self._interrupt_for_draft
        )
        self._deadline = timeouts.propose
        self._length = length
        self._clock = clock
        self._lap_started_ns = 0
        self._finish = finish
        self._recorded_handles = ("", "")
        self._begun = False
        self._abandoned = False
        self._stop_error: OutriderError | None = None
        self._task: asyncio.Task[None] | None = None
        journal.on_failure = self._on_refusal

    @property
    def has_emitted(self) -> bool:
        """Whether a token has gone out."""
        return self._statistics.has_emitted

    def start(self) -> asyncio.Task[None]:
        self._statistics.started(self._plan.prompt_len)
        self._task = asyncio.create_task(self._run())
        return self._task

    async def wait(self, timeout_s: float) -> None:
        """Returns when it has ended, or after `timeout_s`."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)

    async def stop(self, error: OutriderError | None) -> None:
        """Ends the generation where it stands; afterwards it writes nothing any more.

        The stream ends with `error`, or, where that is None, regularly: the session was closed.
        """
        if self._finish is None:
            self._abandon(error)
        if self._task is not None:
            await asyncio.wait([self._task])  # unlike gather: who waits may be cancelled, the generation's end not

    async def _run(self) -> None:
        self._begun = True
        try:
            if self._abandoned:
                raise asyncio.CancelledError
            if self._finish is not None:
                self._commit_and_emit(self._trimmer.trim((), ()))
            else:
                await self._loop()
            await self._journal.drain()
            self._end(self._finish or FinishReason.CLOSED)
        except asyncio.CancelledError:
            self._end_stopped()
        except OutriderError as error:
            self._fail(await self._explained(error))
        except Exception:
            fields = self._plan.log_fields(self._target.round)
            log.exception("session %s: the generation failed", self._plan.session_id, extra=fields)
            self._output.fail(Internal("DEFECT", "internal error; the server's log has the detail"))
        finally:
            self._abandoned = True  # it ends already: who stops it now waits for what it still writes
            self._close_sequences()
            if self._finish is None:
                self._journal.note({"running": "0", **self._handles()})
            await self._journal.settle()

    def _close_sequences(self) -> None:
        self._target.close()
        self._draft.close()
        self._length.close()

    def _end_stopped(self) -> None:
        if self._stop_error is not None:
            self._fail(self._stop_error)
        else:
            self._end(FinishReason.CLOSED)

    async def _explained(self, error: OutriderError) -> OutriderError:
        """Where a worker knows a newer epoch and the store does not, data was lost and a clock went back: the session
        is still this owner's, and may be resumed under an epoch beyond the worker's."""
        if NEWEST_EPOCH not in error.metadata:
            return error
        self._abandoned = True  # it ends already: a refusal of this note must not cancel the way out
        self._journal.note({"worker_epoch": error.metadata[NEWEST_EPOCH]})
        await self._journal.settle()
        if self._journal.failure is not None or not self._journal.is_complete:
            return error
        return Unavailable("MOVED", "a worker knows a newer lease of the session; resume", retry_after_ms=100)

    def _end(self, finish: FinishReason) -> None:
        self._statistics.finished(finish)
        statistics = self._snapshot()
        self._span.set(finish_reason=finish.value, num_tokens=statistics.num_generated_tokens)
        self._log_end(finish.value)
        self._output.end(finish, statistics)

    def _fail(self, error: OutriderError) -> None:
        self._log_end(error.reason)
        self._output.fail(error)

    def _log_end(self, why: str) -> None:
        """Reasons only: an error's message may quote what was asked."""
        fields, num_tokens = self._plan.log_fields(self._target.round), len(self._tokens) - self._plan.prompt_len
        log.info("session %s ended behind %d tokens: %s", self._plan.session_id, num_tokens, why, extra=fields)

    async def _loop(self) -> None:
        self._draft.open()
        await self._open_target()
        self._recorded_handles = self._instance_ids
        while self._finish is None:
            await self._pause_for_slow_client()
            try:
                self._move_if_draining()
                await self._advance()
            except TargetLost as lost:
                await self._target.reopen(lost)

    async def _open_target(self) -> None:
        try:
            self._target.open()
        except OutriderError as error:
            await self._target.reopen(TargetLost(error))

    def _move_if_draining(self) -> None:
        if self._target.should_move:
            try:
                self._target.move()
            except OutriderError as error:
                raise TargetLost(error) from error

    async def _advance(self) -> None:
        """A round where the draft is ready and is expected to pay; else decoding."""
        if num_draft_tokens := self._num_draft_tokens:
            await self._round(num_draft_tokens)
        else:
            await self._decode()

    async def _round(self, num_draft_tokens: int) -> None:
        number = self._target.round + 1
        with self._span.child("outrider.round", round=number, num_draft_tokens=num_draft_tokens) as span:
            proposed = await self._draft.propose(number, num_draft_tokens, span.id)
            if proposed is None:
                return
            verified = await self._target.verify(proposed.proposal, span.id)
            kept, wall_ns = self._trim(verified), self._lap_ns()
            span.set(num_accepted_tokens=verified.num_accepted_tokens, num_tokens=len(kept.token_ids))
        self._statistics.round(proposed, verified, len(kept.token_ids), wall_ns, kept.offset)
        self._length.round(num_draft_tokens, proposed, verified, wall_ns)
        self._deadline.stepped(verified.step_ns)
        self._deadline.verified(num_draft_tokens, verified.num_accepted_tokens)
        self._commit_and_emit(kept)

    async def _decode(self) -> None:
        """The target alone, until a draft is ready and wanted: the first token, then as many as it takes."""
        waits_for_draft = self._draft.wanted and self._target.round < 0 and self._length.choose(self._num_remaining - 1)
        self._lap_ns()
        num_free_tokens = 1 if waits_for_draft else self._num_remaining
        with self._span.child("outrider.decode", round=self._target.round + 1) as span:
            await self._decoded(num_free_tokens, span.id)
        self._lap_ns()

    async def _decoded(self, num_free_tokens: int, parent_span_id: int) -> None:
        self._target.begin_decode(num_free_tokens, parent_span_id)
        done, first = False, True
        while not done and self._finish is None:
            decoded = await self._target.next_decoded()
            done = decoded.done
            if decoded.token_ids:
                kept = self._trim(decoded)
                self._statistics.decoded(len(kept.token_ids), decoded.timings.total_ns)
                self._length.decoded(decoded, self._lap_ns())
                self._deadline.stepped(decoded.step_ns, first=first)
                first = False
                self._commit_and_emit(kept)
                self._draft.note_commits(self._target.round)
            if self._output.full or self._num_draft_tokens or self._target.should_move:
                self._target.interrupt()

    @property
    def _num_draft_tokens(self) -> int:
        """Of the next round, behind which there is room for the target's own token; 0: none is to be drafted."""
        limit = min(self._num_remaining - 1, self._target.max_draft_tokens)
        return self._length.choose(limit) if self._draft.ready else 0

    def _interrupt_for_draft(self) -> None:
        """Not before the first token, which it would only delay: behind that the decoding asks by itself."""
        if len(self._tokens) > self._plan.prompt_len and self._num_draft_tokens:
            self._target.interrupt()

    def _trim(self, result: Tokens) -> Trimmed:
        num_own = len(result.token_ids) - result.num_accepted_tokens
        origins = (TokenOrigin.DRAFT,) * result.num_accepted_tokens + (TokenOrigin.TARGET,) * num_own
        kept = self._trimmer.trim(result.token_ids, origins, result.log_probs, result.top_log_probs)
        self._finish = kept.finish
        self._tokens += kept.token_ids
        self._draft.features.add(result, len(kept.token_ids))
        return kept

    def _commit_and_emit(self, kept: Trimmed) -> None:
        """Hands tokens to the journal; they go out when they are durable, while the next round runs."""
        fields: dict[str, str] = {}
        if self._recorded_handles != self._instance_ids:
            self._recorded_handles, fields = self._instance_ids, self._handles()
        if kept.finish is not None:
            statistics = self._snapshot().to_json()
            fields = {"running": "0", "finish_reason": kept.finish.value, "statistics": statistics}
            fields |= {"reply": self._trimmer.text, **self._handles()}
        log_probs = pack_log_probs(kept, self._plan.num_top_log_probs)
        self._journal.append(kept.token_ids, kept.packed_origins, log_probs, fields, lambda: self._emit(kept))

    def _emit(self, kept: Trimmed) -> None:
        self._statistics.emitted(len(kept.token_ids))
        self._output.put(kept, self._journal.durable_len - self._plan.prompt_len)

    async def _pause_for_slow_client(self) -> None:
        if self._output.full:
            await self._output.writable()
            self._lap_ns()

    def _on_refusal(self, error: OutriderError) -> None:
        """The session is not this generation's any more, or the store is away and it shall not go on without."""
        self._abandon(None if error.reason == "SESSION_CLOSED" else error)

    def _abandon(self, error: OutriderError | None) -> None:
        """Ends the loop at its present await; only the first call counts."""
        if self._task is not None and not self._abandoned:
            self._abandoned, self._stop_error = True, error
            if self._begun:  # a task that is cancelled before its first step would release nothing
                self._task.cancel()

    def _lap_ns(self) -> int:
        """Time since the last call: a round's wall time, with whatever kept it from starting."""
        now_ns = self._clock()
        lap_ns, self._lap_started_ns = now_ns - self._lap_started_ns, now_ns
        return lap_ns

    @property
    def _num_remaining(self) -> int:
        return self._plan.max_len - len(self._tokens)

    def _snapshot(self) -> GenerationStatistics:
        return self._statistics.snapshot(
            num_prompt_tokens=self._plan.prompt_len, num_generated_tokens=len(self._tokens) - self._plan.prompt_len
        )

    @property
    def _instance_ids(self) -> tuple[str, str]:
        return self._target.instance_id, self._draft.instance_id

    def _handles(self) -> dict[str, str]:
        """Where the caches lie; only committed tokens count."""
        handles = {}
        for role, sequence in (("target_handle", self._target), ("draft_handle", self._draft)):
            num_cached_tokens = min(sequence.num_cached_tokens, len(self._tokens) - 1)
            if sequence.attempt:
                handles[role] = KvHandle(sequence.instance_id, sequence.attempt, num_cached_tokens).encode()
        return handles
