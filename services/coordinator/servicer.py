"""outrider.v1.CoordinatorService: decode, one call, encode.

Owns: messages ↔ values of the public interface. Must not know: how generations run.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common import wire
from services.common.api_keys import KeyOwner
from services.common.service import end_tasks
from services.common.values import FinishReason, TokenOrigin
from services.coordinator.admission import Limits, admit, check_session_id
from services.coordinator.authentication import Authenticator
from services.coordinator.config import CoordinatorConfig
from services.coordinator.coordinator import Coordinator
from services.coordinator.draft_pools import DraftPool
from services.coordinator.output import Chunk, Started
from services.coordinator.placement import Placement, Served
from services.coordinator.quotas import Quotas
from services.coordinator.statistics import GenerationStatistics
from services.coordinator.status import StatusReader, WorkerStatus
from services.coordinator.tokenizer_set import TokenizerSet
from services.coordinator.trim import Trimmed

_FINISH_REASONS = {
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CLOSED: pb.FINISH_REASON_CLOSED,
}
_ORIGINS = {
    TokenOrigin.DRAFT: sampling_pb2.TOKEN_ORIGIN_DRAFT,
    TokenOrigin.TARGET: sampling_pb2.TOKEN_ORIGIN_TARGET,
}


Context = grpc.aio.ServicerContext[Any, Any]


class CoordinatorServicer:
    """The RPCs. Errors are raised as they are; services.common.rpc turns them into statuses."""

    def __init__(
        self,
        config: CoordinatorConfig,
        coordinator: Coordinator,
        placement: Placement,
        tokenizers: TokenizerSet,
        status: StatusReader,
        *,
        authenticator: Authenticator,
        quotas: Quotas,
    ) -> None:
        self._config = config
        self._status = status
        self._authenticator = authenticator
        self._quotas = quotas
        self._coordinator = coordinator
        self._placement = placement
        self._tokenizers = tokenizers

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        owner = self._owner(context)
        admitted = dataclasses.replace(admit(request, self._limits(request.model)), owner_key=owner.name)
        async with contextlib.AsyncExitStack() as stack:
            count_tokens = await stack.enter_async_context(self._quotas.generation(owner, admitted.session_id))
            opening = asyncio.create_task(
                stack.enter_async_context(self._coordinator.generate(admitted, _traceparent(context)))
            )
            try:
                while not (await asyncio.wait([opening], timeout=self._config.heartbeat_ms / 1e3))[0]:
                    yield pb.GenerateResponse()
            finally:
                await end_tasks(opening)
                opening.cancelled() or opening.exception()  # known now, also to a client that has left
            stream = opening.result()
            count_tokens(len(stream.started.prompt_token_ids))
            yield pb.GenerateResponse(started=_encode_started(stream.started))
            async for chunk in stream.output:
                response = encode_chunk(chunk)
                count_tokens(len(response.token_ids))
                yield response

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        session_id = check_session_id(request.session_id)
        record, running = await self._coordinator.get(session_id, self._owner(context).name)
        finish = None if running else record.finish_reason
        return pb.GetSessionResponse(
            session_id=record.session_id,
            request_id=record.request_id,
            model=record.model,
            token_ids=record.token_ids,
            prompt_len=record.prompt_len,
            running=running,
            finish_reason=_FINISH_REASONS[finish] if finish else pb.FINISH_REASON_UNSPECIFIED,
            lease_epoch=record.lease_epoch,
            expires_in_s=record.expires_in_s,
        )

    async def CloseSession(self, request: pb.CloseSessionRequest, context: Context) -> pb.CloseSessionResponse:
        await self._coordinator.close_session(check_session_id(request.session_id), self._owner(context).name)
        return pb.CloseSessionResponse()

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[_encode_served(served) for served in self._placement.served])

    async def GetClusterStatus(
        self, request: pb.GetClusterStatusRequest, context: Context
    ) -> pb.GetClusterStatusResponse:
        coordinator, status = self._coordinator, self._status
        return pb.GetClusterStatusResponse(
            instance_id=status.instance_id,
            uptime_s=status.uptime_s,
            draining=coordinator.draining,
            num_requests_running=coordinator.num_streaming,
            num_requests_waiting=coordinator.num_waiting,
            workers=[_encode_worker(worker) for worker in await status.workers()],
            drafts=[_encode_pool(pool, served) for served in self._placement.served for pool in served.drafts],
            activity=pb.CoordinatorActivity(**dataclasses.asdict(status.activity())),
        )

    def _owner(self, context: Context) -> KeyOwner:
        return self._authenticator.identify(context.invocation_metadata() or ())

    def _limits(self, model: str) -> Limits:
        """For a request that names `model`, or none."""
        served = self._placement.served
        named = [pair.model for pair in served if model in ("", pair.model.name)]
        tokenizers = [tokenizer for pair in named if (tokenizer := self._tokenizers.find(pair.name))]
        vocab_sizes = [tokenizer.vocab_size for tokenizer in tokenizers] + [pair.vocab_size for pair in named]
        return Limits(
            models=tuple(pair.model.name for pair in served),
            vocab_size=min(vocab_sizes, default=self._tokenizers.vocab_size),
            default_num_draft_tokens=self._config.fixed_num_draft_tokens,
            max_draft_tokens=self._config.max_draft_tokens,
            max_prompt_bytes=self._config.max_prompt_bytes,
            drafts=self._placement.draft_names,
        )


def _traceparent(context: Context) -> str:
    """The caller's span, from the call's metadata."""
    return next((str(value) for key, value in context.invocation_metadata() or () if key == "traceparent"), "")


def encode_chunk(chunk: Chunk) -> pb.GenerateResponse:
    """One response for all that a chunk holds."""
    response = pb.GenerateResponse(durable_len=chunk.durable_len)
    if chunk.kept:
        response.token_offset = chunk.kept[0].offset
        response.text = "".join(part for kept in chunk.kept for part in (*kept.texts, kept.tail))
        for kept in chunk.kept:
            _add_tokens(response, kept)
    if chunk.finish is not None:
        response.finished.reason = _FINISH_REASONS[chunk.finish]
        if chunk.statistics is not None:
            response.finished.statistics.CopyFrom(_encode_statistics(chunk.statistics))
    return response


def _add_tokens(response: pb.GenerateResponse, kept: Trimmed) -> None:
    response.token_ids.extend(kept.token_ids)
    response.origins.extend([_ORIGINS[origin] for origin in kept.origins])
    response.text_lens.extend([len(text) for text in kept.texts])
    response.log_probs.extend(kept.log_probs)
    for top in kept.top_log_probs:
        response.top_log_probs.add(token_ids=top.token_ids, log_probs=top.log_probs)


def _encode_started(started: Started) -> pb.GenerationStarted:
    return pb.GenerationStarted(
        session_id=started.session_id,
        request_id=started.request_id,
        model=started.model,
        seed=started.seed,
        prompt_token_ids=started.prompt_token_ids,
        lossy=started.lossy,
    )


def _encode_statistics(statistics: GenerationStatistics) -> pb.GenerationStatistics:
    return pb.GenerationStatistics(
        num_prompt_tokens=statistics.num_prompt_tokens,
        num_generated_tokens=statistics.num_generated_tokens,
        num_drafts=statistics.num_drafts,
        num_draft_tokens=statistics.num_draft_tokens,
        num_accepted_tokens=statistics.num_accepted_tokens,
        num_accepted_tokens_per_pos=statistics.num_accepted_tokens_per_pos,
        num_verified_tokens_per_pos=statistics.num_verified_tokens_per_pos,
        num_rounds=statistics.num_rounds,
        ttft_ms=statistics.ttft_ms,
        total_ms=statistics.total_ms,
        draft_ms=statistics.draft_ms,
        verify_ms=statistics.verify_ms,
        overhead_ms=statistics.overhead_ms,
        lossy=statistics.lossy,
        num_replaced_tokens=statistics.num_replaced_tokens,
        num_replaced_rows=statistics.num_replaced_rows,
        draft=statistics.draft,
        rounds=[pb.RoundStatistics(**fields._asdict()) for fields in statistics.rounds],
    )


def _encode_served(served: Served) -> pb.ServedModel:
    drafts = [_encode_pool(pool, served) for pool in served.drafts]
    connected = next((draft for pool, draft in zip(served.drafts, drafts, strict=True) if pool.up), pb.DraftPool())
    return pb.ServedModel(
        name=served.model.name,
        digest=served.model.digest,
        drafter=connected.drafter,
        draft_model=connected.draft_model,
        vocab_size=served.model.vocab_size,
        max_sequence_len=served.max_sequence_len,
        ready=served.ready,
        drafts=drafts,
    )


def _encode_worker(worker: WorkerStatus) -> pb.WorkerStatus:
    view = worker.view
    trouble = "" if view.up else view.link.trouble.message
    info = wire.info_to_proto(worker.info) if worker.info else None
    role = wire.role_to_proto(view.role)
    return pb.WorkerStatus(role=role, address=view.address, pool=view.pool, up=view.up, trouble=trouble, info=info)


def _encode_pool(pool: DraftPool, served: Served) -> pb.DraftPool:
    info, counts = pool.info, pool.share(served.model.name).counts
    return pb.DraftPool(
        name=pool.name,
        weight=pool.weight,
        drafter=info.drafter if info else "",
        draft_model=info.model.name if info and info.model else "",
        ready=pool.fits(served.kind),
        num_drafts=counts.num_drafts,
        num_draft_tokens=counts.num_draft_tokens,
        num_accepted_tokens=counts.num_accepted_tokens,
    )
