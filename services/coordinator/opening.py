"""Opens a session for a generation: decides what its record shall hold, and takes ownership with that.

Owns: new session, next turn, resumption, and what is written at that moment. Must not know: streams, rounds, gRPC.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import struct
from dataclasses import dataclass, replace

from services.common.errors import Aborted, FailedPrecondition, InvalidArgument
from services.common.session_store import PROMPT_ORIGIN, Acquisition, KvHandle, SessionRecord, SessionStore
from services.common.values import TokenOrigin
from services.coordinator.placement import Placed
from services.coordinator.plan import GenerationPlan, cache_salt
from services.coordinator.request import GenerationRequest, TextInput
from services.coordinator.tokenizer import Tokenizer
from services.coordinator.trim import EndRules, Trimmed, Trimmer, log_prob_row_bytes, unpack_log_probs
from services.coordinator.turns import Turn, adopted_tokens, check_prompt_len, next_turn

_INLINE_ENCODE_LEN = 2_000
"""Characters of a plain prompt that are encoded on the event loop: less than handing them to a thread would take."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that is now this coordinator's. `generated` are tokens of this generation that exist already."""

    plan: GenerationPlan
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    origins: bytes
    log_probs: bytes
    num_replaced_tokens: int


class SessionOpener:
    """Acquires sessions in the name of the store's owner."""

    def __init__(self, store: SessionStore, tokenizer: Tokenizer) -> None:
        self._store = store
        self._tokenizer = tokenizer

    async def open(self, request: GenerationRequest, placed: Placed, record: SessionRecord | None) -> Opened:
        """A first or next turn, or the continuation of the record's last generation where the request_id is the same.

        Raises Aborted SESSION_BUSY or OWNERSHIP_LOST, FailedPrecondition MODEL_CHANGED or SESSION_CLOSED, DataLoss,
        InvalidArgument, Unavailable.
        """
        if record and record.target_digest != placed.model.digest:
            raise FailedPrecondition(
                "MODEL_CHANGED",
                f"session {record.session_id} was begun with another model than the target's present one",
            )
        if record and record.request_id == request.request_id:
            return await self._resume(request, placed, record)
        if record and record.running and await self._is_running_elsewhere(record):
            raise busy(request.session_id)
        return await self._begin(request, placed, record)

    async def _is_running_elsewhere(self, record: SessionRecord) -> bool:
        return record.owner_id != self._store.owner_id and await self._store.is_alive(record.owner_id)

    async def _begin(self, request: GenerationRequest, placed: Placed, record: SessionRecord | None) -> Opened:
        turn = await self._turn(request, record)
        check_prompt_len(request, len(turn.token_ids), placed.target.max_sequence_len)
        adopted = adopted_tokens((), request.resume)
        seed = secrets.randbits(64) if request.seed is None else request.seed
        new = (*turn.token_ids[turn.num_kept_tokens :], *adopted)
        num_prompt_tokens = len(turn.token_ids) - turn.num_kept_tokens
        acquisition = Acquisition(
            session_id=request.session_id,
            expected_epoch=record.lease_epoch if record else None,
            num_kept_tokens=turn.num_kept_tokens,
            token_ids=new,
            origins=bytes([PROMPT_ORIGIN]) * num_prompt_tokens + _adopted_origins(adopted),
            log_probs=_missing_log_probs(request, len(adopted)),
            fields={
                "request_id": request.request_id,
                "request_digest": request.digest,
                "owner_key": request.owner_key,
                "model": request.model,
                "target_digest": placed.model.digest,
                "draft_digest": placed.draft.model.digest if placed.draft and placed.draft.model else "",
                "seed": str(seed),
                "prompt_len": str(len(turn.token_ids)),
                "parameters": request.parameters(),
                "messages": turn.messages,
                **_handles(placed),
            },
        )
        epoch = await self._store.acquire(acquisition)
        return Opened(
            plan=self._plan(request, placed, epoch, len(turn.token_ids), seed),
            prompt=turn.token_ids,
            generated=adopted,
            origins=_adopted_origins(adopted),
            log_probs=acquisition.log_probs,
            num_replaced_tokens=len(record.token_ids) - turn.num_kept_tokens if record else 0,
        )

    async def _resume(self, request: GenerationRequest, placed: Placed, record: SessionRecord) -> Opened:
        check_prompt_len(request, record.prompt_len, placed.target.max_sequence_len)
        generated = record.token_ids[record.prompt_len :]
        adopted = adopted_tokens(generated, request.resume)
        missing_log_probs = _missing_log_probs(request, len(adopted))
        epoch = await self._store.acquire(
            Acquisition(
                session_id=request.session_id,
                expected_epoch=record.lease_epoch,
                num_kept_tokens=len(record.token_ids),
                token_ids=adopted,
                origins=_adopted_origins(adopted),
                num_kept_log_prob_bytes=len(record.log_probs),
                log_probs=missing_log_probs,
                fields=_handles(placed),
            )
        )
        return Opened(
            plan=self._plan(request, placed, epoch, record.prompt_len, record.seed),
            prompt=record.token_ids[: record.prompt_len],
            generated=(*generated, *adopted),
            origins=record.origins[record.prompt_len :] + _adopted_origins(adopted),
            log_probs=record.log_probs + missing_log_probs,
            num_replaced_tokens=0,
        )

    async def _turn(self, request: GenerationRequest, record: SessionRecord | None) -> Turn:
        small = record is None and isinstance(request.input, TextInput) and len(request.input.text) < _INLINE_ENCODE_LEN
        if small:
            return next_turn(request, record, self._tokenizer)
        return await asyncio.to_thread(next_turn, request, record, self._tokenizer)

    def _plan(
        self, request: GenerationRequest, placed: Placed, epoch: int, prompt_len: int, seed: int
    ) -> GenerationPlan:
        eos = frozenset[int]() if request.ignore_eos else self._tokenizer.eos_token_ids
        return GenerationPlan(
            session_id=request.session_id,
            lease_epoch=epoch,
            prompt_len=prompt_len,
            max_len=min(prompt_len + request.max_tokens, placed.target.max_sequence_len),
            end_token_ids=eos | frozenset(request.stop_token_ids),
            sampling=replace(request.sampling, seed=seed),
            verification=request.verification,
            num_draft_tokens=_num_draft_tokens(request, placed),
            log_probs=request.log_probs,
            num_top_log_probs=request.num_top_log_probs,
            vocab_size=placed.model.vocab_size,
            adaptive=request.num_draft_tokens is None,
            cache_salt=cache_salt(request.owner_key),
        )


def new_trimmer(request: GenerationRequest, tokenizer: Tokenizer, prompt: tuple[int, ...], max_tokens: int) -> Trimmer:
    """A trimmer that has seen nothing yet, for a generation of at most `max_tokens`."""
    rules = EndRules(
        eos_token_ids=frozenset() if request.ignore_eos else tokenizer.eos_token_ids,
        stop_token_ids=frozenset(request.stop_token_ids),
        stop=request.stop,
        max_tokens=max_tokens,
    )
    return Trimmer(rules, tokenizer.text_stream(include_special_tokens=request.include_special_tokens, context=prompt))


def replay(trimmer: Trimmer, generated: tuple[int, ...], origins: bytes, log_probs: bytes, num_top: int) -> Trimmed:
    """Feeds a fresh trimmer with tokens that exist already."""
    return trimmer.trim(generated, [TokenOrigin(byte) for byte in origins], *unpack_log_probs(log_probs, num_top))


def check_same_request(request: GenerationRequest, digest: str) -> None:
    """Raises InvalidArgument REQUEST_MISMATCH where a request_id comes again with other parameters."""
    if request.digest != digest:
        raise InvalidArgument(
            "REQUEST_MISMATCH",
            f"request_id: {request.request_id} was used before with another prompt or other parameters",
            field="request_id",
        )


def busy(session_id: str) -> Aborted:
    return Aborted("SESSION_BUSY", f"session {session_id} is busy with another request", retry_after_ms=200)


def _handles(placed: Placed) -> dict[str, str]:
    handles = {"target_handle": KvHandle(placed.target.instance_id, 1, 0).encode(), "draft_handle": ""}
    if placed.draft:
        handles["draft_handle"] = KvHandle(placed.draft.instance_id, 1, 0).encode()
    return handles


def _num_draft_tokens(request: GenerationRequest, placed: Placed) -> int:
    """As asked, at most what target and draft take."""
    limits = [placed.target.max_draft_tokens] + ([placed.draft.max_draft_tokens] if placed.draft else [])
    return min(limits) if request.num_draft_tokens is None else min(request.num_draft_tokens, *limits)


def _adopted_origins(adopted: tuple[int, ...]) -> bytes:
    return bytes([TokenOrigin.TARGET]) * len(adopted)


def _missing_log_probs(request: GenerationRequest, num_tokens: int) -> bytes:
    """Rows for tokens whose log-probabilities nobody knows any more."""
    width = log_prob_row_bytes(request.num_top_log_probs) // 4
    return struct.pack(f"<{width}f", *[math.nan] * width) * num_tokens if request.log_probs else b""
