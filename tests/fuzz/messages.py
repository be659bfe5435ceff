"""Requests as nobody sane sends them: good ones with some fields at any value, and bytes that are almost a message.

Owns: how inputs are made, from the protos' descriptors and a few good requests. Must not know: services, outcomes.
Everything comes from the generator of random numbers, so that a seed names a batch.
"""

from __future__ import annotations

import struct
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from outrider.v1 import coordinator_pb2, draft_pb2, target_pb2, worker_pb2

SESSIONS = tuple(f"6f2f9f0e-5f0a-4c7e-9a58-0d2d3f1c7b4{digit}" for digit in range(4))
_MAX_DEPTH = 4
_TEXTS = (
    "",
    "\0",
    "a" * 300,
    "\u202e",
    "\U0001f600" * 20,
    "user",
    "system",
    "simulated",
    "default",
    "{{",
    "a",
    *SESSIONS,
)
_NUMBERS = (
    -(2**63),
    -(2**31),
    -1,
    0,
    1,
    2,
    3,
    16,
    17,
    255,
    256,
    257,
    65_535,
    2**31 - 1,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
_FLOATS = (0.0, -0.0, 1.0, 0.5, float("nan"), float("inf"), float("-inf"), -1e-45, 3e38, 1e-300, 2.0)
_BOUNDS: dict[int, tuple[int, int]] = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-1, 9),
}


def good_request(rng: Random, name: str) -> Message:
    """One that the method of that name serves."""
    session = rng.choice(SESSIONS)
    match name:
        case "Generate":
            known = session if rng.random() < 0.5 else ""
            return coordinator_pb2.GenerateRequest(prompt="a", max_tokens=5, ignore_eos=True, session_id=known)
        case "GetSession":
            return coordinator_pb2.GetSessionRequest(session_id=session)
        case "CloseSession":
            return coordinator_pb2.CloseSessionRequest(session_id=session)
        case "ListModels":
            return coordinator_pb2.ListModelsRequest()
        case "GetWorkerInfo":
            return worker_pb2.GetWorkerInfoRequest()
    identity = worker_pb2.ItemIdentity(session_id=session, lease_epoch=rng.randint(1, 3), attempt=1, base_len=2)
    opened = worker_pb2.OpenItem(
        identity=identity, prefix_piece=_tokens([65, 66]), last_piece=True, prompt_len=2, max_new_tokens=9
    )
    if name == "DraftStream":
        propose = draft_pb2.ProposeItem(identity=identity, num_draft_tokens=3, proposal_id=1)
        return draft_pb2.DraftStreamRequest(opens=[opened], proposes=[propose])
    decode = target_pb2.DecodeItem(identity=identity, num_free_tokens=2)
    return target_pb2.TargetStreamRequest(opens=[opened], decodes=[decode])


def encoded(rng: Random, name: str) -> bytes:
    """Bytes for the method of that name."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randint(0, 200))
    message = good_request(rng, name)
    if rng.random() < 0.2:
        message.Clear()
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        _change(message, rng)
    data = bytearray(message.SerializeToString())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            _damage(data, rng)
    return bytes(data)


def _change(message: Message, rng: Random, depth: int = 0) -> None:
    """Sets one field of the message, or of one of those in it."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = rng.choice(fields)
    value = getattr(message, field.name)
    if field.message_type is None:
        if field.is_repeated:
            value.extend(_scalar(field, rng) for _ in range(rng.randint(0, 6)))
        else:
            setattr(message, field.name, _scalar(field, rng))
    elif field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        value[_scalar(entry["key"], rng)] = _scalar(entry["value"], rng)
    elif depth < _MAX_DEPTH:
        if field.is_repeated:
            nested = rng.choice(value) if value and rng.random() < 0.7 else value.add()
        else:
            nested = value
            nested.SetInParent()
        for _ in range(rng.randint(1, 3)):
            _change(nested, rng, depth + 1)


def _scalar(field: FieldDescriptor, rng: Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice(_FLOATS) if rng.random() < 0.7 else struct.unpack("<f", rng.randbytes(4))[0]
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            if rng.random() < 0.5:
                return rng.randbytes(rng.randint(0, 50))
            return _tokens([rng.choice((65, 66, 255, 256, 257, 2**32 - 1)) for _ in range(rng.randint(0, 40))])
        case FieldDescriptor.CPPTYPE_STRING:
            if rng.random() < 0.7:
                return rng.choice(_TEXTS)
            return "".join(chr(rng.choice((rng.randint(0, 127), rng.randint(0xE000, 0x10FFFF)))) for _ in range(9))
    low, high = _BOUNDS[field.cpp_type]
    number = rng.choice(_NUMBERS) if rng.random() < 0.7 else rng.randint(0, 40)
    return min(max(number, low), high)


def _tokens(token_ids: list[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def _damage(data: bytearray, rng: Random) -> None:
    at = rng.randint(0, len(data))
    match rng.randint(0, 3):
        case 0 if at < len(data):
            data[at] = rng.randint(0, 255)
        case 1:
            del data[at:]
        case 2:
            data[at:at] = data[max(0, at - 8) : at]
        case _:
            data[at:at] = rng.randbytes(rng.randint(1, 6))
