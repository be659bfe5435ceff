"""Values of the session store: what a record holds, and what is written to it.

Owns: their encodings. Must not know: Redis, who may write when.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from services.common.values import FinishReason

PROMPT_ORIGIN = 0
"""The byte in `origins` of a token that nobody generated; others are TokenOrigin values."""
ANONYMOUS = "anonymous"
"""The owner key of sessions while requests carry no credentials."""


def pack_token_ids(token_ids: Sequence[int]) -> bytes:
    """uint32, little-endian."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_token_ids(data: bytes) -> tuple[int, ...]:
    """The inverse of pack_token_ids."""
    return struct.unpack(f"<{len(data) // 4}I", data)


@dataclass(frozen=True, slots=True)
class KvHandle:
    """Where a role's KV cache of the session lies. Only a hint: losing it costs a prefill."""

    instance_id: str
    attempt: int
    num_cached_tokens: int

    def encode(self) -> str:
        return f"{self.instance_id} {self.attempt} {self.num_cached_tokens}"

    @classmethod
    def decode(cls, text: str) -> KvHandle | None:
        if not text:
            return None
        instance_id, attempt, num_cached_tokens = text.rsplit(" ", 2)
        return cls(instance_id, int(attempt), int(num_cached_tokens))


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """What Redis holds of a session. `messages`, `parameters` and `statistics` are JSON of the coordinator's making."""

    session_id: str
    token_ids: tuple[int, ...]
    origins: bytes
    log_probs: bytes
    owner_id: str
    lease_epoch: int
    running: bool
    request_id: str
    request_digest: str
    owner_key: str
    model: str
    target_digest: str
    target_numerics: str
    """What decides the target's tokens besides its digest."""
    draft_digest: str
    seed: int
    prompt_len: int
    parameters: str
    messages: str
    reply: str
    finish_reason: FinishReason | None
    statistics: str
    target_handle: KvHandle | None
    draft_handle: KvHandle | None
    expires_in_s: int
    fork: int = 0
    """The noise fork of its generations: 0 unless the session is a copy of another."""
    worker_epoch: int = 0
    """The newest lease_epoch that a worker was found to know, where that was beyond the record's."""

    @property
    def num_generated_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def fields(self) -> dict[str, str]:
        """What says who the last generation is; ownership and the generation's end are not among it."""
        names = ("request_id", "request_digest", "owner_key", "model", "target_digest")
        others = ("target_numerics", "draft_digest", "seed", "fork", "prompt_len", "parameters", "messages")
        return {name: str(getattr(self, name)) for name in (*names, *others)}


@dataclass(frozen=True, slots=True)
class Acquisition:
    """Takes a session over and says what it shall then hold. `expected_epoch` None: the session must not exist yet.

    Of what is stored, `num_kept_tokens` and `num_kept_log_prob_bytes` stay; the rest is cut off before the appends.
    With `expected_len`, exactly that many tokens must be stored: nothing is cut off that its taker has not seen.
    """

    session_id: str
    expected_epoch: int | None
    num_kept_tokens: int
    token_ids: Sequence[int]
    origins: bytes
    fields: Mapping[str, str]
    least_epoch: int = 0
    num_kept_log_prob_bytes: int = 0
    log_probs: bytes = b""
    expected_len: int | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """Appends a generation's next tokens behind `base_len`; `fields` go in with the same write."""

    session_id: str
    lease_epoch: int
    base_len: int
    token_ids: Sequence[int]
    origins: bytes
    log_probs: bytes = b""
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restoration:
    """The whole record as its owner knows it, to stand in place of one that the store has lost, or lost a part of."""

    session_id: str
    lease_epoch: int
    packed_token_ids: bytes
    origins: bytes
    log_probs: bytes
    fields: Mapping[str, str]


Write = Commit | Restoration


class RecordLost(Exception):
    """The store holds less of the record than it acknowledged: it came back without its data, or with older data."""


class RecordMoved(Exception):
    """The record is not what its reader saw: its owner has added tokens meanwhile."""


def decode_record(
    session_id: str, fields: Mapping[str, str], token_ids: bytes, origins: bytes, log_probs: bytes, expires_in_s: int
) -> SessionRecord:
    """The record from its keys' values."""
    finish = fields.get("finish_reason")
    return SessionRecord(
        session_id=session_id,
        token_ids=unpack_token_ids(token_ids),
        origins=origins,
        log_probs=log_probs,
        owner_id=fields["owner_id"],
        lease_epoch=int(fields["lease_epoch"]),
        running=fields.get("running") == "1",
        request_id=fields.get("request_id", ""),
        request_digest=fields.get("request_digest", ""),
        owner_key=fields.get("owner_key", ANONYMOUS),
        model=fields.get("model", ""),
        target_digest=fields.get("target_digest", ""),
        target_numerics=fields.get("target_numerics", ""),
        draft_digest=fields.get("draft_digest", ""),
        seed=int(fields.get("seed", "0")),
        prompt_len=int(fields.get("prompt_len", "0")),
        parameters=fields.get("parameters", ""),
        messages=fields.get("messages", ""),
        reply=fields.get("reply", ""),
        finish_reason=FinishReason(finish) if finish else None,
        statistics=fields.get("statistics", ""),
        target_handle=KvHandle.decode(fields.get("target_handle", "")),
        draft_handle=KvHandle.decode(fields.get("draft_handle", "")),
        expires_in_s=expires_in_s,
        fork=int(fields.get("fork", "0")),
        worker_epoch=int(fields.get("worker_epoch", "0")),
    )
