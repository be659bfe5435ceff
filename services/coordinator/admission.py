"""The door: a GenerateRequest message → an admitted request, or the error that names the field and its limit.

Owns: every check that needs nothing but the message and the limits. Must not know: sessions, workers, gRPC calls.
Pure functions; ids that the client left out are the only thing drawn here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from outrider.v1 import coordinator_pb2, sampling_pb2

from services.common import wire
from services.common.errors import InvalidArgument, NotFound
from services.common.values import (
    LOGIT_BIAS_RANGE,
    MAX_LOGIT_BIAS,
    MAX_TOP_LOG_PROBS,
    SAMPLING_RANGES,
    Range,
    SamplingParams,
)
from services.coordinator.chat_template import Message
from services.coordinator.request import ChatInput, Fork, GenerationRequest, ResumePoint, TextInput, TokenInput

N = TypeVar("N", int, float)

ROLES = ("system", "user", "assistant")
DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 64
MAX_CACHE_SALT_BYTES = 128
MAX_MESSAGES = 1024
MAX_MAX_TOKENS = 1 << 20
MIN_TEMPERATURE = 1e-5
"""Below this, logits divided by the temperature leave float32: it is greedy."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are checked against. `models` are the names served; empty while no target is known.

    `default_num_draft_tokens` None: as many as pay.
    """

    models: tuple[str, ...]
    vocab_size: int
    default_num_draft_tokens: int | None
    max_draft_tokens: int
    max_prompt_bytes: int
    drafts: tuple[str, ...] = ()


def admit(message: coordinator_pb2.GenerateRequest, limits: Limits) -> GenerationRequest:
    """Checks everything and fills in the defaults.

    Raises InvalidArgument INVALID_PARAMETER or PROMPT_TOO_LONG, NotFound UNKNOWN_MODEL.
    """
    sampling = _sampling(message.sampling, limits)
    max_tokens = _within("max_tokens", message.max_tokens or DEFAULT_MAX_TOKENS, 1, MAX_MAX_TOKENS)
    request_id = _uuid(message.request_id, "request_id")
    fork = _fork(message)
    request = GenerationRequest(
        session_id=_forked_id(fork, request_id) if fork else _uuid(message.session_id, "session_id"),
        request_id=request_id,
        model=_model(message.model, limits),
        input=_input(message, limits),
        sampling=sampling,
        seed=message.sampling.seed if message.sampling.HasField("seed") else None,
        max_tokens=max_tokens,
        stop=_stop(message),
        stop_token_ids=_stop_token_ids(message, limits),
        verification=wire.method_from_proto(message.verification),
        num_draft_tokens=_num_draft_tokens(message, limits),
        default_num_draft_tokens=limits.default_num_draft_tokens,
        draft=_draft(message.draft, limits),
        log_probs=message.log_probs,
        num_top_log_probs=_within("num_top_log_probs", message.num_top_log_probs, 0, MAX_TOP_LOG_PROBS),
        ignore_eos=message.ignore_eos,
        include_special_tokens=message.include_special_tokens,
        resume=_resume(message, max_tokens, limits),
        fork=fork,
        cache_salt=_cache_salt(message.cache_salt),
    )
    if request.num_top_log_probs and not request.log_probs:
        raise _invalid("num_top_log_probs", "needs log_probs")
    if sampling.min_tokens > request.max_tokens:
        raise _invalid(
            "sampling.min_tokens", f"{sampling.min_tokens} exceeds max_tokens, which is {request.max_tokens}"
        )
    return request


def check_session_id(session_id: str) -> str:
    """The UUID in its usual form. Raises InvalidArgument where there is none."""
    if not session_id:
        raise _invalid("session_id", "must be given")
    return _uuid(session_id, "session_id")


def _uuid(text: str, field: str) -> str:
    if not text:
        return str(uuid.uuid4())
    try:
        if len(text) != 36:
            raise ValueError
        return str(uuid.UUID(text))
    except ValueError:
        raise _invalid(field, "must be a UUID such as 123e4567-e89b-42d3-a456-426614174000") from None


def _fork(message: coordinator_pb2.GenerateRequest) -> Fork | None:
    length = message.fork_len if message.HasField("fork_len") else None
    if not message.fork:
        if length is not None:
            raise _invalid("fork_len", "needs fork")
        return None
    if length == 0:
        raise _invalid("fork_len", "must be at least 1")
    return Fork(check_session_id(message.session_id), length)


def _forked_id(fork: Fork, request_id: str) -> str:
    """The same for the same request, so that it may be sent again."""
    return str(uuid.uuid5(uuid.UUID(fork.source_id), request_id))


def _model(name: str, limits: Limits) -> str:
    if not name and len(limits.models) > 1:
        raise _invalid("model", f"name one of {', '.join(limits.models)}")
    if not name and limits.models:
        return limits.models[0]
    if name and limits.models and name not in limits.models:
        raise NotFound("UNKNOWN_MODEL", f"no model {name[:80]!r}; there is {', '.join(limits.models)}", field="model")
    return name


def _input(message: coordinator_pb2.GenerateRequest, limits: Limits) -> TextInput | ChatInput | TokenInput:
    match message.WhichOneof("input"):
        case "prompt":
            _prompt_bytes("prompt", len(message.prompt.encode()), limits)
            return TextInput(message.prompt)
        case "chat":
            return _chat(message.chat, limits)
        case "tokens":
            _prompt_bytes("tokens.token_ids", 4 * len(message.tokens.token_ids), limits)
            return TokenInput(_token_ids("tokens.token_ids", message.tokens.token_ids, limits))
    if message.fork:
        return TokenInput(())
    raise _invalid("input", "must be one of prompt, chat and tokens")


def _chat(chat: coordinator_pb2.ChatInput, limits: Limits) -> ChatInput:
    _within("chat.messages", len(chat.messages), 1, MAX_MESSAGES)
    _prompt_bytes("chat.messages", sum(len(m.content.encode()) + len(m.role) for m in chat.messages), limits)
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise _invalid(f"chat.messages[{index}].role", f"must be one of {', '.join(ROLES)}")
    return ChatInput(tuple(Message(m.role, m.content) for m in chat.messages))


def _prompt_bytes(field: str, num_bytes: int, limits: Limits) -> None:
    if num_bytes == 0:
        raise _invalid(field, "must not be empty")
    if num_bytes > limits.max_prompt_bytes:
        raise InvalidArgument(
            "PROMPT_TOO_LONG",
            f"{field}: {num_bytes} bytes exceed the limit of {limits.max_prompt_bytes}",
            field=field,
            metadata={"limit": str(limits.max_prompt_bytes)},
        )


def _token_ids(field: str, token_ids: Iterable[int], limits: Limits) -> tuple[int, ...]:
    ids = tuple(token_ids)
    if ids and (highest := max(ids)) >= limits.vocab_size:
        raise _invalid(field, f"token id {highest} is outside the vocabulary of {limits.vocab_size}")
    return ids


def _stop(message: coordinator_pb2.GenerateRequest) -> tuple[str, ...]:
    _at_most("stop", len(message.stop), MAX_STOPS)
    for text in message.stop:
        if not 1 <= len(text.encode()) <= MAX_STOP_BYTES:
            raise _invalid("stop", f"each string must have 1 to {MAX_STOP_BYTES} bytes")
    return tuple(message.stop)


def _stop_token_ids(message: coordinator_pb2.GenerateRequest, limits: Limits) -> tuple[int, ...]:
    _at_most("stop_token_ids", len(message.stop_token_ids), MAX_STOP_TOKEN_IDS)
    return tuple(sorted(set(_token_ids("stop_token_ids", message.stop_token_ids, limits))))


def _draft(name: str, limits: Limits) -> str:
    if name and name not in limits.drafts:
        raise _invalid("draft", f"no draft pool {name[:80]!r}; there is {', '.join(limits.drafts) or 'none'}")
    return name


def _cache_salt(salt: str) -> str:
    if (num_bytes := len(salt.encode())) > MAX_CACHE_SALT_BYTES:
        raise _invalid("cache_salt", f"{num_bytes} bytes exceed the limit of {MAX_CACHE_SALT_BYTES}")
    return salt


def _num_draft_tokens(message: coordinator_pb2.GenerateRequest, limits: Limits) -> int | None:
    if not message.HasField("num_draft_tokens"):
        return None
    return _within("num_draft_tokens", message.num_draft_tokens, 0, limits.max_draft_tokens)


def _resume(message: coordinator_pb2.GenerateRequest, max_tokens: int, limits: Limits) -> ResumePoint | None:
    if not message.HasField("resume"):
        return None
    _within("resume.num_received_tokens", message.resume.num_received_tokens, 0, max_tokens)
    if len(message.resume.tokens_beyond_durable) > message.resume.num_received_tokens:
        raise _invalid("resume.tokens_beyond_durable", "has more tokens than resume.num_received_tokens says")
    beyond = _token_ids("resume.tokens_beyond_durable", message.resume.tokens_beyond_durable, limits)
    return ResumePoint(message.resume.num_received_tokens, beyond, message.resume.num_prompt_tokens)


def _sampling(message: sampling_pb2.SamplingParams, limits: Limits) -> SamplingParams:
    """The values in their documented ranges; NaN and infinities are in none of them."""
    _at_most("sampling.logit_bias", len(message.logit_bias), MAX_LOGIT_BIAS)
    sampling = wire.sampling_from_proto(message)
    for name, allowed in SAMPLING_RANGES.items():
        _within(f"sampling.{name}", getattr(sampling, name), *allowed)
    _token_ids("sampling.logit_bias", [token_id for token_id, _ in sampling.logit_bias], limits)
    for token_id, bias in sampling.logit_bias:
        _within(f"sampling.logit_bias[{token_id}]", bias, *LOGIT_BIAS_RANGE)
    _within("sampling.min_tokens", sampling.min_tokens, 0, MAX_MAX_TOKENS)
    return replace(sampling, temperature=0.0) if sampling.temperature < MIN_TEMPERATURE else sampling


def _within(field: str, value: N, low: float, high: float, low_open: bool = False) -> N:
    allowed = Range(low, high, low_open)
    if not allowed.holds(value):
        raise _invalid(field, f"{value} is not in {allowed}")
    return value


def _at_most(field: str, num: int, limit: int) -> None:
    """To be called before the entries are looked at: a message of 16 MB holds millions, and this is the event loop."""
    if num > limit:
        raise _invalid(field, f"{num} entries exceed the limit of {limit}")


def _invalid(field: str, sentence: str) -> InvalidArgument:
    return InvalidArgument("INVALID_PARAMETER", f"{field}: {sentence}", field=field)
