"""The client's values ↔ messages of CoordinatorService.

Owns: that translation, both ways. Must not know: calls, streams, retries.
"""

from __future__ import annotations

from outrider.v1 import coordinator_pb2, sampling_pb2

from services.client.values import (
    Chat,
    DraftPool,
    GenerateOptions,
    Prompt,
    Round,
    ServedModel,
    SessionRecord,
    Statistics,
    Token,
    TokenIds,
)
from services.common.errors import InvalidArgument
from services.common.values import FinishReason, TokenOrigin, TopLogProbs
from services.common.wire import method_to_proto, sampling_to_proto

_FINISH_REASONS = {
    coordinator_pb2.FINISH_REASON_EOS: FinishReason.EOS,
    coordinator_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    coordinator_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    coordinator_pb2.FINISH_REASON_CLOSED: FinishReason.CLOSED,
}


def request_to_proto(
    prompt: Prompt | None,
    options: GenerateOptions,
    *,
    session_id: str,
    request_id: str,
    seed: int,
    fork: bool = False,
    fork_len: int | None = None,
) -> coordinator_pb2.GenerateRequest:
    """Raises InvalidArgument for values that the message's fields cannot hold, such as a negative count."""
    try:
        request = coordinator_pb2.GenerateRequest(
            session_id=session_id,
            request_id=request_id,
            model=options.model,
            sampling=sampling_to_proto(options.sampling(seed)),
            max_tokens=options.max_tokens,
            stop=options.stop,
            verification=method_to_proto(options.verification),
            num_draft_tokens=options.num_draft_tokens,
            draft=options.draft,
            log_probs=options.log_probs,
            num_top_log_probs=options.num_top_log_probs,
            ignore_eos=options.ignore_eos,
            include_special_tokens=options.include_special_tokens,
            stop_token_ids=options.stop_token_ids,
            fork=fork,
            fork_len=fork_len,
            cache_salt=options.cache_salt,
        )
        _set_prompt(request, prompt)
    except (ValueError, TypeError) as error:
        raise InvalidArgument("INVALID_PARAMETER", f"the request cannot be encoded: {error}") from None
    return request


def _set_prompt(request: coordinator_pb2.GenerateRequest, prompt: Prompt | None) -> None:
    match prompt:
        case None:
            pass
        case str():
            request.prompt = prompt
        case Chat(messages):
            request.chat.SetInParent()
            for message in messages:
                request.chat.messages.add(role=message.role, content=message.content)
        case TokenIds(token_ids):
            request.tokens.SetInParent()
            request.tokens.token_ids.extend(token_ids)


def tokens_from_proto(response: coordinator_pb2.GenerateResponse) -> tuple[Token, ...]:
    """The response's tokens, each with its part of the text. Fields that the server left out are None or empty."""
    tokens, position = [], 0
    for index, token_id in enumerate(response.token_ids):
        text_len = response.text_lens[index] if index < len(response.text_lens) else 0
        is_draft = index < len(response.origins) and response.origins[index] == sampling_pb2.TOKEN_ORIGIN_DRAFT
        top = response.top_log_probs[index] if index < len(response.top_log_probs) else None
        tokens.append(
            Token(
                token_id=token_id,
                origin=TokenOrigin.DRAFT if is_draft else TokenOrigin.TARGET,
                text=response.text[position : position + text_len],
                log_prob=response.log_probs[index] if index < len(response.log_probs) else None,
                top_log_probs=TopLogProbs(tuple(top.token_ids), tuple(top.log_probs)) if top is not None else None,
            )
        )
        position += text_len
    return tuple(tokens)


def finish_reason_from_proto(number: int) -> FinishReason | None:
    return _FINISH_REASONS.get(number)  # type: ignore[call-overload, no-any-return]


def statistics_from_proto(message: coordinator_pb2.GenerationStatistics) -> Statistics:
    return Statistics(
        num_prompt_tokens=message.num_prompt_tokens,
        num_generated_tokens=message.num_generated_tokens,
        num_drafts=message.num_drafts,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
        num_accepted_tokens_per_pos=tuple(message.num_accepted_tokens_per_pos),
        num_verified_tokens_per_pos=tuple(message.num_verified_tokens_per_pos),
        num_rounds=message.num_rounds,
        ttft_ms=message.ttft_ms,
        total_ms=message.total_ms,
        draft_ms=message.draft_ms,
        verify_ms=message.verify_ms,
        overhead_ms=tuple(message.overhead_ms),
        lossy=message.lossy,
        num_replaced_tokens=message.num_replaced_tokens,
        num_replaced_rows=message.num_replaced_rows,
        draft=message.draft,
        rounds=tuple(_round_from_proto(entry) for entry in message.rounds),
    )


def _round_from_proto(message: coordinator_pb2.RoundStatistics) -> Round:
    return Round(
        token_offset=message.token_offset,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
        draft_ms=message.draft_ms,
        verify_ms=message.verify_ms,
    )


def session_from_proto(message: coordinator_pb2.GetSessionResponse) -> SessionRecord:
    return SessionRecord(
        session_id=message.session_id,
        request_id=message.request_id,
        model=message.model,
        token_ids=tuple(message.token_ids),
        prompt_len=message.prompt_len,
        running=message.running,
        finish_reason=finish_reason_from_proto(message.finish_reason),
        lease_epoch=message.lease_epoch,
        expires_in_s=message.expires_in_s,
    )


def model_from_proto(message: coordinator_pb2.ServedModel) -> ServedModel:
    return ServedModel(
        name=message.name,
        digest=message.digest,
        drafter=message.drafter,
        draft_model=message.draft_model,
        vocab_size=message.vocab_size,
        max_sequence_len=message.max_sequence_len,
        ready=message.ready,
        drafts=tuple(pool_from_proto(draft) for draft in message.drafts),
    )


def pool_from_proto(message: coordinator_pb2.DraftPool) -> DraftPool:
    return DraftPool(
        name=message.name,
        weight=message.weight,
        drafter=message.drafter,
        draft_model=message.draft_model,
        ready=message.ready,
        num_drafts=message.num_drafts,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
    )
