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
from services.coordinator.placement import Placed, Placement, Wish
from services.coordinator.plan import GenerationPlan, cache_salt
from services.coordinator.request import GenerationRequest, TextInput
from services.coordinator.tokenizer import Tokenizer
from services.coordinator.trim import EndRules, Trimmed, Trimmer, log_prob_row_bytes, unpack_log_probs
from services.coordinator.turns import Turn, adopted_tokens, check_prompt_len, check_same_prompt, forked, next_turn

_INLINE_ENCODE_LEN = 2_000
"""Characters of a plain prompt that are encoded on the event loop: less than handing them to a thread would take."""
_INLINE_REPLAY_LEN = 256
"""Tokens whose text is made on the event loop."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that is now this coordinator's. `generated` are tokens of this generation that exist already.

    `copy` is the record as it is now stored.
    """

    placed: Placed
    plan: GenerationPlan
    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    origins: bytes
    log_probs: bytes
    num_replaced_tokens: int
    copy: RecordCopy


class SessionOpener:
    """Acquires sessions in the name of the store's owner, and places their generations."""

    def __init__(self, store: SessionStore, usage: SessionUsage, placement: Placement) -> None:
        self._store = store
        self._usage = usage
        self._placement = placement

    async def open(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        record: SessionRecord | None,
        source: SessionRecord | None = None,
    ) -> Opened:
        """A first or next turn, or the continuation of the record's last generation where the request_id is the same.

        Without a record, `source` is the one of which the new session is a fork.
        Raises Aborted SESSION_BUSY, FailedPrecondition MODEL_CHANGED or SESSION_CLOSED, DataLoss, InvalidArgument,
        ResourceExhausted SESSION_LIMIT or TOKEN_LIMIT, Unavailable, and what Placement.place does; RecordMoved: load
        the record again.
        """
        resumes = record is not None and record.request_id == request.request_id
        if record and not resumes and record.running and await self._is_running_elsewhere(record):
            raise busy(request.session_id)
        self._placement.check(request.model)  # before the prompt is encoded in vain
        base = record or (forked(request, source) if source else None)
        turn = Turn(record.token_ids, 0, "") if record and resumes else await self._turn(request, tokenizer, base)
        prompt_len = record.prompt_len if record and resumes else len(turn.token_ids)
        placed = self._placement.place(_wish(request, turn.token_ids, prompt_len, base))
        try:
            _check_model(base, placed, resumes)
            if record and resumes:
                return await self._resume(request, tokenizer, placed, record)
            return await self._begin(request, tokenizer, placed, turn, record, base)
        except BaseException:
            placed.release()
            raise

    async def _is_running_elsewhere(self, record: SessionRecord) -> bool:
        return record.owner_id != self._store.owner_id and await self._store.is_alive(record.owner_id)

    async def _begin(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        placed: Placed,
        turn: Turn,
        record: SessionRecord | None,
        base: SessionRecord | None,
    ) -> Opened:
        """`base` is what the turn extends: the record, or what a new session is a fork of."""
        prompt_len = len(turn.token_ids)
        check_prompt_len(request, prompt_len, placed.target.max_sequence_len)
        check_same_prompt(request, prompt_len)
        adopted = adopted_tokens((), request.resume)
        _check_adopted(request, tokenizer, placed, turn.token_ids, (), adopted)
        seed = secrets.randbits(64) if request.seed is None else request.seed
        fork = record.fork if record else (_noise_fork(request.session_id) if base else 0)
        plan = _plan(request, tokenizer, placed, prompt_len, seed, fork)
        prompt_origins = base.origins[: turn.num_kept_tokens] if base else b""
        origins = prompt_origins.ljust(prompt_len, bytes([PROMPT_ORIGIN])) + _adopted_origins(adopted)
        num_stored = turn.num_kept_tokens if record else 0
        acquisition = Acquisition(
            session_id=request.session_id,
            expected_epoch=record.lease_epoch if record else None,
            expected_len=len(record.token_ids) if record else 0,
            least_epoch=record.worker_epoch + 1 if record else 0,
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
                "target_numerics": placed.kind.numerics,
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
            placed=placed,
            plan=replace(plan, lease_epoch=epoch),
            prompt=turn.token_ids,
            generated=adopted,
            origins=_adopted_origins(adopted),
            log_probs=acquisition.log_probs,
            num_replaced_tokens=len(base.token_ids) - turn.num_kept_tokens if base else 0,
            copy=_copy((*turn.token_ids, *adopted), origins, acquisition.log_probs, acquisition.fields),
        )

    async def _reserve_and_acquire(self, request: GenerationRequest, acquisition: Acquisition, max_len: int) -> int:
        """Whichever fails, the session counts as before; it may have been done all the same, and answered too late.

        Where somebody else took the session meanwhile, what it counts is theirs to say.
        """
        try:
            await self._usage.reserve(request.owner_key, request.session_id, max_len)
            return await self._store.acquire(acquisition)
        except OutriderError as error:
            if error.reason != "SESSION_BUSY":
                held = None if acquisition.expected_epoch is None else acquisition.expected_len
                self._usage.note(request.owner_key, request.session_id, held)
            raise

    async def _resume(
        self, request: GenerationRequest, tokenizer: Tokenizer, placed: Placed, record: SessionRecord
    ) -> Opened:
        check_prompt_len(request, record.prompt_len, placed.target.max_sequence_len)
        prompt, generated = record.token_ids[: record.prompt_len], record.token_ids[record.prompt_len :]
        adopted = adopted_tokens(generated, request.resume)
        _check_adopted(request, tokenizer, placed, prompt, generated, adopted)
        missing_log_probs = _missing_log_probs(request, len(adopted))
        acquisition = Acquisition(
            session_id=request.session_id,
            expected_epoch=record.lease_epoch,
            expected_len=len(record.token_ids),
            least_epoch=record.worker_epoch + 1,
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
        plan = _plan(request, tokenizer, placed, record.prompt_len, record.seed, record.fork)
        self._usage.note(request.owner_key, request.session_id, plan.max_len)
        origins, log_probs = record.origins + _adopted_origins(adopted), record.log_probs + missing_log_probs
        fields = {**record.fields(), **acquisition.fields}
        return Opened(
            placed=placed,
            plan=replace(plan, lease_epoch=epoch),
            prompt=prompt,
            generated=(*generated, *adopted),
            origins=origins[record.prompt_len :],
            log_probs=log_probs,
            num_replaced_tokens=0,
            copy=_copy((*record.token_ids, *adopted), origins, log_probs, fields),
        )

    @staticmethod
    async def _turn(request: GenerationRequest, tokenizer: Tokenizer, record: SessionRecord | None) -> Turn:
        small = record is None and isinstance(request.input, TextInput) and len(request.input.text) < _INLINE_ENCODE_LEN
        if small:
            return next_turn(request, record, tokenizer)
        return await asyncio.to_thread(next_turn, request, record, tokenizer)


def _wish(
    request: GenerationRequest, token_ids: tuple[int, ...], prompt_len: int, record: SessionRecord | None
) -> Wish:
    target, draft = (record.target_handle, record.draft_handle) if record else (None, None)
    return Wish(
        model=request.model,
        token_ids=token_ids,
        max_len=prompt_len + request.max_tokens,
        num_draft_tokens=request.wanted_num_draft_tokens,
        draft=request.draft,
        session_id=request.session_id,
        target_instance_id=target.instance_id if target else "",
        draft_instance_id=draft.instance_id if draft else "",
    )


def _check_model(record: SessionRecord | None, placed: Placed, resumes: bool) -> None:
    """Raises FailedPrecondition MODEL_CHANGED. A generation that goes on needs equal arithmetic as well."""
    if record is None:
        return
    changed = record.target_digest != placed.model.digest
    if changed or (resumes and record.target_numerics != placed.kind.numerics):
        raise FailedPrecondition(
            "MODEL_CHANGED",
            f"session {record.session_id} was begun with another model than the target's present one"
            + ("" if changed else f" ({record.target_numerics}, now {placed.kind.numerics})"),
        )


def _plan(
    request: GenerationRequest, tokenizer: Tokenizer, placed: Placed, prompt_len: int, seed: int, fork: int
) -> GenerationPlan:
    """Without its lease_epoch."""
    eos = frozenset[int]() if request.ignore_eos else tokenizer.eos_token_ids
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
        adaptive=request.wanted_num_draft_tokens is None,
        features=placed.draft is not None and placed.draft.wants_features,
        fork=fork,
        cache_salt=cache_salt(request.owner_key, request.cache_salt),
    )


def _check_adopted(
    request: GenerationRequest,
    tokenizer: Tokenizer,
    placed: Placed,
    prompt: tuple[int, ...],
    generated: tuple[int, ...],
    adopted: tuple[int, ...],
) -> None:
    """Raises InvalidArgument for tokens that lie behind the generation's end."""
    if not adopted:
        return
    max_tokens = min(request.max_tokens, placed.target.max_sequence_len - len(prompt))
    trimmer = new_trimmer(request, tokenizer, prompt, max_tokens)
    whole = (*generated, *adopted)
    if len(trimmer.trim(whole, [TokenOrigin.TARGET] * len(whole)).token_ids) < len(whole):
        field = "resume.tokens_beyond_durable"
        raise InvalidArgument("REQUEST_MISMATCH", f"{field}: go on behind the generation's end", field=field)


def new_trimmer(request: GenerationRequest, tokenizer: Tokenizer, prompt: tuple[int, ...], max_tokens: int) -> Trimmer:
    """A trimmer that has seen nothing yet, for a generation of at most `max_tokens`."""
    rules = EndRules(
        eos_token_ids=frozenset() if request.ignore_eos else tokenizer.eos_token_ids,
        stop_token_ids=frozenset(request.stop_token_ids),
        stop=request.stop,
        max_tokens=max_tokens,
    )
    return Trimmer(rules, tokenizer.text_stream(include_special_tokens=request.include_special_tokens, context=prompt))


async def replay(
    trimmer: Trimmer, generated: tuple[int, ...], origins: bytes, log_probs: bytes, num_top: int
) -> Trimmed:
    """Feeds a fresh trimmer with tokens that exist already; many of them on a thread."""

    def trim() -> Trimmed:
        return trimmer.trim(generated, [TokenOrigin(byte) for byte in origins], *unpack_log_probs(log_probs, num_top))

    return trim() if len(generated) <= _INLINE_REPLAY_LEN else await asyncio.to_thread(trim)


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
    """As wanted, at most what target and draft take."""
    wanted = request.wanted_num_draft_tokens
    limits = [placed.target.max_draft_tokens] + ([placed.draft.max_draft_tokens] if placed.draft else [])
    return min(limits) if wanted is None else min(wanted, *limits)


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
