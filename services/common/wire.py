"""Values and items ↔ protobuf messages of the worker protocol. Used by servicers and clients only.

Owns: the encoding of bulk fields (little-endian uint32 and float32) and what makes a message malformed.
Must not know: gRPC calls, the engine, what an item causes. Malformed fields raise InvalidArgument naming the field.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from outrider.v1 import sampling_pb2, worker_pb2

from services.common.errors import ERRORS_BY_CODE, NEWEST_EPOCH, Internal, InvalidArgument, OutriderError
from services.common.items import Close, Identity, Open, Timings
from services.common.values import (
    ModelInfo,
    SamplingParams,
    SparseRow,
    TopLogProbs,
    VerificationMethod,
    WorkerActivity,
    WorkerInfo,
    WorkerLoad,
)

MAX_PIECE_BYTES = 65_536
"""An Open's token prefix travels in pieces of at most this size."""

MAX_ITEMS_A_MESSAGE = 256
"""Items or results: the largest ones, with rows or log-probabilities, stay below the 4 MB cap at this number."""

MAX_UNREAD_RESULTS = 131_072
"""A coordinator that leaves more of a stream's results unread loses the stream; one that keeps to `max_free_tokens`
never does. Half of them are for sequences that were closed meanwhile, and for refusals."""
MAX_FEATURE_BYTES = 2 << 20
"""Features in one message, of all its items together."""

_METHODS = {
    VerificationMethod.COUPLED: sampling_pb2.VERIFICATION_METHOD_COUPLED,
    VerificationMethod.REJECTION: sampling_pb2.VERIFICATION_METHOD_REJECTION,
    VerificationMethod.THRESHOLD: sampling_pb2.VERIFICATION_METHOD_THRESHOLD,
}
_METHODS_BACK = {number: method for method, number in _METHODS.items()}
_METHODS_BACK[sampling_pb2.VERIFICATION_METHOD_UNSPECIFIED] = VerificationMethod.COUPLED
_ROLES = {"draft": worker_pb2.WORKER_ROLE_DRAFT, "target": worker_pb2.WORKER_ROLE_TARGET}
_ROLES_BACK = {number: role for role, number in _ROLES.items()}


def role_to_proto(role: str) -> worker_pb2.WorkerRole.ValueType:
    return _ROLES[role]


def role_from_proto(number: int) -> str:
    """Empty for a role that this version does not know."""
    return str(_ROLES_BACK.get(number, ""))  # type: ignore[call-overload]


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as little-endian uint32."""
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpack_tokens(data: bytes, field: str = "token_ids") -> tuple[int, ...]:
    """The ids in `data`. Raises InvalidArgument naming `field` if its length is not a multiple of 4."""
    return _unpack(data, "I", field)


def pack_floats(values: Sequence[float]) -> bytes:
    """Numbers as little-endian float32."""
    return struct.pack(f"<{len(values)}f", *values)


def unpack_floats(data: bytes, field: str) -> tuple[float, ...]:
    """The numbers in `data`. Raises InvalidArgument naming `field` if its length is not a multiple of 4."""
    return _unpack(data, "f", field)


def _unpack(data: bytes, kind: str, field: str) -> tuple[Any, ...]:
    if len(data) % 4:
        raise InvalidArgument("UNDECODABLE", f"{field} holds {len(data)} bytes, not a multiple of 4", field=field)
    return struct.unpack(f"<{len(data) // 4}{kind}", data)


def method_to_proto(method: VerificationMethod) -> sampling_pb2.VerificationMethod.ValueType:
    return _METHODS[method]


def method_from_proto(number: int) -> VerificationMethod:
    """Unspecified is coupled. Raises InvalidArgument for a number that this version does not know."""
    try:
        return _METHODS_BACK[number]  # type: ignore[index]
    except KeyError:
        raise InvalidArgument("INVALID_PARAMETER", f"verification {number} is unknown", field="verification") from None


def sampling_to_proto(sampling: SamplingParams) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        min_tokens=sampling.min_tokens,
    )


def sampling_from_proto(message: sampling_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        seed=message.seed,
        min_tokens=message.min_tokens,
    )


def identity_to_proto(identity: Identity) -> worker_pb2.ItemIdentity:
    return worker_pb2.ItemIdentity(
        session_id=identity.session_id,
        lease_epoch=identity.lease_epoch,
        attempt=identity.attempt,
        round=identity.round,
        base_len=identity.base_len,
    )


def identity_from_proto(message: worker_pb2.ItemIdentity) -> Identity:
    return Identity(message.session_id, message.lease_epoch, message.attempt, message.round, message.base_len)


def proposal_rows_to_proto(rows: Iterable[SparseRow | None]) -> worker_pb2.SparseRows:
    """An absent row travels as an empty one, which the target takes for a point mass."""
    kept = [row or SparseRow((), ()) for row in rows]
    return worker_pb2.SparseRows(
        row_lens=[len(row.token_ids) for row in kept],
        token_ids=pack_tokens([token_id for row in kept for token_id in row.token_ids]),
        probs=pack_floats([prob for row in kept for prob in row.probs]),
    )


def proposal_rows_from_proto(message: worker_pb2.SparseRows, num_tokens: int) -> tuple[SparseRow | None, ...]:
    """One row for each drafted token. Rows that do not fit the message become empty ones: a draft is only a hint."""
    lens = list(message.row_lens)
    total = sum(lens)
    if len(lens) != num_tokens or len(message.token_ids) != 4 * total or len(message.probs) != 4 * total:
        return (SparseRow((), ()),) * num_tokens
    ids = unpack_tokens(message.token_ids)
    probs = unpack_floats(message.probs, "probs")
    ends = accumulate(lens)
    return tuple(SparseRow(ids[end - n : end], probs[end - n : end]) for n, end in zip(lens, ends, strict=True))


def timings_to_proto(timings: Timings) -> worker_pb2.ItemTimings:
    return worker_pb2.ItemTimings(queue_ns=timings.queue_ns, forward_ns=timings.forward_ns, total_ns=timings.total_ns)


def timings_from_proto(message: worker_pb2.ItemTimings) -> Timings:
    return Timings(message.queue_ns, message.forward_ns, message.total_ns)


def load_to_proto(load: WorkerLoad) -> worker_pb2.WorkerLoad:
    return worker_pb2.WorkerLoad(
        num_sequences=load.num_sequences,
        num_queued=load.num_queued,
        num_used_blocks=load.num_used_blocks,
        num_blocks=load.num_blocks,
        draining=load.draining,
    )


def load_from_proto(message: worker_pb2.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        message.num_sequences, message.num_queued, message.num_used_blocks, message.num_blocks, message.draining
    )


def error_to_proto(error: OutriderError) -> worker_pb2.ItemError:
    return worker_pb2.ItemError(
        code=error.code,
        reason=error.reason,
        message=error.message,
        retry_after_ms=error.retry_after_ms or 0,
        newest_lease_epoch=int(error.metadata.get(NEWEST_EPOCH, 0)),
    )


def error_from_proto(message: worker_pb2.ItemError) -> OutriderError:
    kind = ERRORS_BY_CODE.get(message.code, Internal)
    metadata = {NEWEST_EPOCH: str(message.newest_lease_epoch)} if message.newest_lease_epoch else {}
    return kind(message.reason, message.message, retry_after_ms=message.retry_after_ms or None, metadata=metadata)


def info_to_proto(info: WorkerInfo) -> worker_pb2.GetWorkerInfoResponse:
    response = worker_pb2.GetWorkerInfoResponse(
        instance_id=info.instance_id,
        role=_ROLES[info.role],
        protocol_version=info.protocol_version,
        noise_version=info.noise_version,
        drafter=info.drafter,
        max_draft_tokens=info.max_draft_tokens,
        max_sequences=info.max_sequences,
        max_sequence_len=info.max_sequence_len,
        load=load_to_proto(info.load),
        startup_ms=info.startup_ms,
        activity=worker_pb2.WorkerActivity(**dataclasses.asdict(info.activity)),
        wants_features=info.wants_features,
    )
    if model := info.model:
        response.model.CopyFrom(
            worker_pb2.ModelInfo(
                name=model.name,
                digest=model.digest,
                vocab_digest=model.vocab_digest,
                vocab_size=model.vocab_size,
                dtype=model.dtype,
                device=model.device,
            )
        )
    return response


def info_from_proto(message: worker_pb2.GetWorkerInfoResponse) -> WorkerInfo:
    model = message.model
    return WorkerInfo(
        instance_id=message.instance_id,
        role=_ROLES_BACK.get(message.role, ""),
        model=ModelInfo(model.name, model.digest, model.vocab_digest, model.vocab_size, model.dtype, model.device)
        if message.HasField("model")
        else None,
        drafter=message.drafter,
        max_draft_tokens=message.max_draft_tokens,
        max_sequences=message.max_sequences,
        max_sequence_len=message.max_sequence_len,
        load=load_from_proto(message.load),
        protocol_version=message.protocol_version,
        noise_version=message.noise_version,
        startup_ms=message.startup_ms,
        activity=activity_from_proto(message.activity),
        wants_features=message.wants_features,
    )


def activity_from_proto(message: worker_pb2.WorkerActivity) -> WorkerActivity:
    return WorkerActivity(**{field.name: getattr(message, field.name) for field in dataclasses.fields(WorkerActivity)})


def open_to_proto(item: Open) -> list[worker_pb2.OpenItem]:
    """The pieces of an Open, in order; the parameters ride on the last one."""
    data = pack_tokens(item.prefix)
    identity = identity_to_proto(item.identity)
    starts = range(0, len(data), MAX_PIECE_BYTES)
    pieces = [
        worker_pb2.OpenItem(identity=identity, prefix_piece=data[start : start + MAX_PIECE_BYTES]) for start in starts
    ] or [worker_pb2.OpenItem(identity=identity)]
    pieces[-1].MergeFrom(
        worker_pb2.OpenItem(
            last_piece=True,
            prompt_len=item.prompt_len,
            eos_token_ids=sorted(item.eos_token_ids),
            sampling=sampling_to_proto(item.sampling),
            verification=method_to_proto(item.verification),
            max_new_tokens=item.max_new_tokens,
            log_probs=item.log_probs,
            num_top_log_probs=item.num_top_log_probs,
            fork=item.fork,
            cache_salt=item.cache_salt,
            traceparent=item.traceparent,
            features=item.features,
        )
    )
    return pieces


def close_to_proto(item: Close) -> worker_pb2.CloseItem:
    return worker_pb2.CloseItem(identity=identity_to_proto(item.identity))


def close_from_proto(message: worker_pb2.CloseItem) -> Close:
    return Close(identity_from_proto(message.identity))


class FeatureBudget:
    """The features of one message: whoever comes last goes without, so that the message stays below the 4 MB cap."""

    def __init__(self) -> None:
        self._num_left_bytes = MAX_FEATURE_BYTES

    def take(self, features: bytes) -> bytes:
        """The features if there is room for them, else none."""
        if len(features) > self._num_left_bytes:
            return b""
        self._num_left_bytes -= len(features)
        return features


class OpenAssembler:
    """Puts the pieces of Opens together; one for each stream.

    Holds at most `max_prefix_len` tokens of each of `max_pending` sequences; refuses and drops what exceeds that.
    """

    def __init__(self, max_prefix_len: int, max_pending: int) -> None:
        self._max_bytes = 4 * max_prefix_len
        self._max_pending = max_pending
        self._pieces: dict[tuple[str, int, int], bytearray] = {}

    def add(self, message: worker_pb2.OpenItem) -> Open | None:
        """The complete Open with the last piece, else None. Raises InvalidArgument for a bad or too long prefix."""
        identity = identity_from_proto(message.identity)
        key = (identity.session_id, identity.lease_epoch, identity.attempt)
        data = self._pieces.pop(key, None) or bytearray()
        data += message.prefix_piece
        if len(data) > self._max_bytes or 4 * identity.base_len > self._max_bytes:
            raise InvalidArgument(
                "PROMPT_TOO_LONG",
                f"prefix of {identity.base_len} tokens exceeds the limit of {self._max_bytes // 4}",
                field="prefix_piece",
            )
        if not message.last_piece:
            if len(self._pieces) >= self._max_pending:
                raise InvalidArgument(
                    "INVALID_PARAMETER", f"more than {self._max_pending} unfinished opens", field="last_piece"
                )
            self._pieces[key] = data
            return None
        prefix = unpack_tokens(bytes(data), "prefix_piece")
        if len(prefix) != identity.base_len:
            raise InvalidArgument(
                "INVALID_PARAMETER",
                f"prefix has {len(prefix)} tokens, base_len says {identity.base_len}",
                field="base_len",
            )
        return Open(
            identity=identity,
            prefix=prefix,
            prompt_len=message.prompt_len,
            eos_token_ids=frozenset(message.eos_token_ids),
            sampling=sampling_from_proto(message.sampling),
            verification=method_from_proto(message.verification),
            max_new_tokens=message.max_new_tokens,
            log_probs=message.log_probs,
            num_top_log_probs=message.num_top_log_probs,
            fork=message.fork,
            cache_salt=message.cache_salt,
            traceparent=message.traceparent,
            features=message.features,
        )


def top_log_probs_to_bytes(tops: Sequence[TopLogProbs]) -> tuple[bytes, bytes]:
    """Ids and log-probabilities of all positions, end to end."""
    return (
        pack_tokens([token_id for top in tops for token_id in top.token_ids]),
        pack_floats([log_prob for top in tops for log_prob in top.log_probs]),
    )


def top_log_probs_from_bytes(ids: bytes, log_probs: bytes, num_tokens: int) -> tuple[TopLogProbs, ...]:
    """The inverse; every position has equally many."""
    if not ids or not num_tokens:
        return ()
    width = len(ids) // 4 // num_tokens
    all_ids, all_values = unpack_tokens(ids, "top_token_ids"), unpack_floats(log_probs, "top_log_probs")
    return tuple(
        TopLogProbs(all_ids[i * width : (i + 1) * width], all_values[i * width : (i + 1) * width])
        for i in range(num_tokens)
    )


def max_free_tokens(max_sequences: int) -> int:
    """Tokens that a coordinator asks of a worker in one Decode: each is a result that may wait unread."""
    return max(1, MAX_UNREAD_RESULTS // 2 // max(1, max_sequences))
