"""The wire contract as an earlier version had it: message classes of its own, beside the present ones.

Owns: reading protos/outrider-v1.binpb. Must not know: what the messages mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)
IMAGE = Path(__file__).parents[1] / "protos" / "outrider-v1.binpb"


def _read() -> tuple[descriptor_pool.DescriptorPool, list[str]]:
    pool, names = descriptor_pool.DescriptorPool(), list[str]()
    for file in descriptor_pb2.FileDescriptorSet.FromString(IMAGE.read_bytes()).file:
        pool.Add(file)
        names += [f"{file.package}.{message.name}" for message in file.message_type]
    return pool, [name for name in names if name.startswith("outrider.")]


_POOL, NAMES = _read()


def message_class(name: str) -> type[Message]:
    """The predecessor's class of that full name. Raises KeyError where it had none."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))


def as_known_then(message: M) -> M:
    """What is left of a message that went through the predecessor's hands, its unknown fields dropped."""
    old = message_class(message.DESCRIPTOR.full_name).FromString(message.SerializeToString())
    old.DiscardUnknownFields()
    return type(message).FromString(old.SerializeToString())


def filled(kind: type[M], depth: int = 4) -> Iterator[M]:
    """Messages with all fields set, to other values than their defaults: as many as its widest choice has members."""
    descriptor = kind.DESCRIPTOR
    for turn in range(max([1, *(len(oneof.fields) for oneof in descriptor.oneofs)])):
        message = kind()
        for field in descriptor.fields:
            choice = field.containing_oneof
            if choice is None or choice.fields[turn % len(choice.fields)] is field:
                _fill(message, descriptor, field, turn, depth)
        yield message


def _fill(message: Message, descriptor: Descriptor, field: FieldDescriptor, turn: int, depth: int) -> None:
    if field.message_type is None:
        value = _value(field)
        if field.is_repeated:
            getattr(message, field.name).extend([value, value])
        else:
            setattr(message, field.name, value)
    elif field.message_type.GetOptions().map_entry:
        key, entry = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        getattr(message, field.name)[_value(key)] = _value(entry)
    elif depth:
        parts = list(filled(message_factory.GetMessageClass(field.message_type), depth - 1))
        if field.is_repeated:
            getattr(message, field.name).extend(parts)
        else:
            getattr(message, field.name).CopyFrom(parts[turn % len(parts)])


def _value(field: FieldDescriptor) -> object:
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    return {
        FieldDescriptor.CPPTYPE_STRING: b"\1\2\3\4" if field.type == FieldDescriptor.TYPE_BYTES else "text",
        FieldDescriptor.CPPTYPE_BOOL: True,
        FieldDescriptor.CPPTYPE_FLOAT: 0.5,
        FieldDescriptor.CPPTYPE_DOUBLE: 0.5,
    }.get(field.cpp_type, 7 + field.number)
