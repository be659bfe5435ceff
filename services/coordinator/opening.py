"""Opens a session for a generation: decides what its record shall hold, and takes ownership with that.

Owns: new session, next turn, fork, resumption, and what is written then. Must not know: streams, rounds, gRPC.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace

from services.common.errors import Aborted, FailedPrecondition, InvalidArgument, OutriderError
from services.common.session_record import PROMPT_ORIGIN, Acquisition, KvHandle, RecordMoved, SessionRecord
from services.common.session_store import SessionStore
from services.common.session_usage import SessionUsage
from services.common.values import TokenOrigin
from services.coordinator.journal import RecordCopy
from services.coordinator.placement import Placed
from services.coordinator.plan import GenerationPlan
from services.coordinator.request import GenerationRequest, TextInput
from services.coordinator.tokenizer import Tokenizer
from services.coordinator.trim import EndRules, Trimmed, Trimmer, log_prob_row_bytes, unpack_log_probs
from services.coordinator.turns import Turn, adopted_tokens, check_prompt_len, check_same_prompt, forked, next_turn

_INLINE_ENCODE_LEN = 2_000
"""Characters of a plain prompt that are encoded on the event loop: less than handing them to a thread would take."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that is now this coordinator's. `generated` are tokens of this generation that exist already.

    `copy` is the record as it is now stored.
    """

    plan: GenerationPlan
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    origins: bytes
    log_probs: bytes
    num_replaced_tokens: int
    copy: RecordCopy


class SessionOpener:
    """Acquires sessions in the name of the store's owner."""

    def __init__(self, store: SessionStore, usage: SessionUsage, tokenizer: Tokenizer) -> None:
        self._store = store
        self._usage = usage
        self._tokenizer = tokenizer

    async def open(
        self,
        request: GenerationRequest,
        placed: Placed,
        record: SessionRecord | None,
        source: SessionRecord | None = None,
    ) -> Opened:
        """A first or next turn, or the continuation of the record's last generation where the request_id is the same.

        Without a record, `source` is the one of which the new session is a fork.
        Raises Aborted SESSION_BUSY, FailedPrecondition MODEL_CHANGED or SESSION_CLOSED, DataLoss, InvalidArgument,
        ResourceExhausted SESSION_LIMIT or TOKEN_LIMIT, Unavailable; RecordMoved: load the record again.
        """
        base = record or source
        if base and base.target_digest != placed.model.digest:
            raise FailedPrecondition(
                "MODEL_CHANGED", f"session {base.session_id} was begun with another model than the target's present one"
            )
        if record and record.request_id == request.request_id:
            return await self._resume(request, placed, record)
        if record and record.running and await self._is_running_elsewhere(record):
            raise busy(request.session_id)
        return await self._begin(request, placed, record, source)

    async def _is_running_elsewhere(self, record: SessionRecord) -> bool:
        return record.owner_id != self._store.owner_id and await self._store.is_alive(record.owner_id)

    async def _begin(
        self, request: GenerationRequest, placed: Placed, record: SessionRecord | None, source: SessionRecord | None
    ) -> Opened:
        fork = record.fork if record else 0
        base = record
        if source and not record:
            base, fork = forked(request, source), _noise_fork(request.session_id)
        turn = await self._turn(request, base)
        prompt_len = len(turn.token_ids)
        check_prompt_len(request, prompt_len, placed.target.max_sequence_len)
        check_same_prompt(request, prompt_len)
        adopted = adopted_tokens((), request.resume)
        self._check_adopted(request, placed, turn.token_ids, (), adopted)
        seed = secrets.randbits(64) if request.seed is None else request.seed
        plan = self._plan(request, placed, prompt_len, seed, fork)
        prompt_origins = (base.origins[: turn.num_kept_tokens] if base else b"").ljust(
            prompt_len, bytes([PROMPT_ORIGIN])
        )
        origins = prompt_origins + _adopted_origins(adopted)
        num_stored = turn.num_kept_tokens if record else 0  # of a fork, nothing
        acquisition = Acquisition(
            session_id=request.session_id,
            expected_epoch=record.lease_epoch if record else None,
            least_epoch=record.worker_epoch + 1 if record else 0,
            expected_len=len(record.token_ids) if record else 0,
            num_kept_tokens=num_stored,
            token_ids=(*turn.token_ids[num_stored:], *adopted),
            origins=origins[num_stored:],
            log_probs=_missing_log_probs(request, len(adopted)),
            fields={
                "request_id": request.request_id,
                "request_digest": request.digest,
                "owner_key": request.owner_key,
                "model": request.model,
                "target_digest": placed.model.digest,
                "draft_digest": placed.draft.model.digest if placed.draft and placed.draft.model else "",
                "seed": str(seed),
                "fork": str(fork),
                "prompt_len": str(prompt_len),
                "parameters": request.parameters(),
                "messages": turn.messages,
                **_handles(placed),
            },
        )
        epoch = await self._reserve_and_acquire(request, acquisition, plan.max_len)
        return Opened(
            plan=replace(plan, lease_epoch=epoch),
            prompt=turn.token_ids,
            generated=adopted,
            origins=_adopted_origins(adopted),
            log_probs=acquisition.log_probs,
            num_replaced_tokens=len(base.token_ids) - turn.num_kept_tokens if base else 0,
            copy=_copy((*turn.token_ids, *adopted), origins, acquisition.log_probs, acquisition.fields),
        )

    async def _reserve_and_acquire(self, request: GenerationRequest, acquisition: Acquisition, max_len: int) -> int:
        await self._usage.reserve(request.owner_key, request.session_id, max_len)
        try:
            return await self._store.acquire(acquisition)
        except OutriderError:
            if acquisition.expected_epoch is None:
                self._usage.note(request.owner_key, request.session_id, None)
            raise

    async def _resume(self, request: GenerationRequest, placed: Placed, record: SessionRecord) -> Opened:
        check_prompt_len(request, record.prompt_len, placed.target.max_sequence_len)
        prompt, generated = record.token_ids[: record.prompt_len], record.token_ids[record.prompt_len :]
        adopted = adopted_tokens(generated, request.resume)
        self._check_adopted(request, placed, prompt, generated, adopted)
        missing_log_probs = _missing_log_probs(request, len(adopted))
        acquisition = Acquisition(
            session_id=request.session_id,
            expected_epoch=record.lease_epoch,
            least_epoch=record.worker_epoch + 1,
            expected_len=len(record.token_ids),
            num_kept_tokens=len(record.token_ids),
            token_ids=adopted,
            origins=_adopted_origins(adopted),
            num_kept_log_prob_bytes=len(record.log_probs),
            log_probs=missing_log_probs,
            fields=_handles(placed),
        )
        try:
            epoch = await self._store.acquire(acquisition)
        except RecordMoved:
            await self._store.fence(request.session_id, record.lease_epoch)
            raise
        plan = self._plan(request, placed, record.prompt_len, record.seed, record.fork)
        self._usage.note(request.owner_key, request.session_id, plan.max_len)
        origins, log_probs = record.origins + _adopted_origins(adopted), record.log_probs + missing_log_probs
        fields = {**record.fields(), **acquisition.fields}
        return Opened(
            plan=replace(plan, lease_epoch=epoch),
            prompt=prompt,
            generated=(*generated, *adopted),
            origins=origins[record.prompt_len :],
            log_probs=log_probs,
            num_replaced_tokens=0,
            copy=_copy((*record.token_ids, *adopted), origins, log_probs, fields),
        )

    def _check_adopted(
        self,
        request: GenerationRequest,
        placed: Placed,
        prompt: tuple[int, ...],
        generated: tuple[int, ...],
        adopted: tuple[int, ...],
    ) -> None:
        """Raises InvalidArgument for tokens that lie behind the generation's end."""
        if not adopted:
            return
        max_tokens = min(request.max_tokens, placed.target.max_sequence_len - len(prompt))
        trimmer = new_trimmer(request, self._tokenizer, prompt, max_tokens)
        whole = (*generated, *adopted)
        if len(trimmer.trim(whole, [TokenOrigin.TARGET] * len(whole)).token_ids) < len(whole):
            field = "resume.tokens_beyond_durable"
            raise InvalidArgument("REQUEST_MISMATCH", f"{field}: go on behind the generation's end", field=field)

    async def _turn(self, request: GenerationRequest, record: SessionRecord | None) -> Turn:
        small = record is None and isinstance(request.input, TextInput) and len(request.input.text) < _INLINE_ENCODE_LEN
        if small:
            return next_turn(request, record, self._tokenizer)
        return await asyncio.to_thread(next_turn, request, record, self._tokenizer)

    def _plan(
        self, request: GenerationRequest, placed: Placed, prompt_len: int, seed: int, fork: int
    ) -> GenerationPlan:
        """Without its lease_epoch."""
        eos = frozenset[int]() if request.ignore_eos else self._tokenizer.eos_token_ids
        return GenerationPlan(
            session_id=request.session_id,
            lease_epoch=0,
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
            fork=fork,
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


def _copy(token_ids: tuple[int, ...], origins: bytes, log_probs: bytes, fields: Mapping[str, str]) -> RecordCopy:
    return RecordCopy.of(token_ids, origins, log_probs, {**fields, "running": "1"})


def _noise_fork(session_id: str) -> int:
    """Of a session that is a fork, from its own id: another than its source's and its siblings'."""
    return int.from_bytes(hashlib.sha256(session_id.encode()).digest()[:4]) or 1


def _adopted_origins(adopted: tuple[int, ...]) -> bytes:
    return bytes([TokenOrigin.TARGET]) * len(adopted)


def _missing_log_probs(request: GenerationRequest, num_tokens: int) -> bytes:
    """Rows for tokens whose log-probabilities nobody knows any more."""
    width = log_prob_row_bytes(request.num_top_log_probs) // 4
    return struct.pack(f"<{width}f", *[math.nan] * width) * num_tokens if request.log_probs else b""
