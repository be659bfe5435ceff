"""`python -m tests.fakes.other_version predecessor|successor MODULE FLAGS`: a service of another version.

Owns: what such a service reads and says in place of this version's messages. Must not know: what the messages mean.
The predecessor drops the fields that it does not know, in both directions, at both sides of its connections. The
successor says more than this version knows: every message, however deep, has a field added.
"""

from __future__ import annotations

import functools
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message

from services.common import rpc
from tests.predecessor import as_known_then

M = TypeVar("M", bound=Message)
ADDED = "added_later"
_NUMBER = 15_999
_CALLS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def as_said_later(message: Message) -> bytes:
    """What a successor sends for `message`."""
    later = _later_class(message.DESCRIPTOR.file, message.DESCRIPTOR.full_name).FromString(message.SerializeToString())
    for part in _parts(later):
        setattr(part, ADDED, "unknown to its reader")
    return bytes(later.SerializeToString())


def _parts(message: Any) -> Iterator[Any]:
    """The message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for part in value if field.is_repeated else [value]:
                yield from _parts(part)


@functools.cache
def _later_class(file: FileDescriptor, name: str) -> type[Message]:
    pool = descriptor_pool.DescriptorPool()
    _add(file, pool, set())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def _add(file: FileDescriptor, pool: descriptor_pool.DescriptorPool, added: set[str]) -> None:
    for dependency in file.dependencies:
        _add(dependency, pool, added)
    if file.name in added:
        return
    added.add(file.name)
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    if file.package.startswith("outrider."):
        for message in proto.message_type:
            _grow(message)
    pool.Add(proto)


def _grow(message: descriptor_pb2.DescriptorProto) -> None:
    kinds = descriptor_pb2.FieldDescriptorProto
    if not message.options.map_entry:
        message.field.add(name=ADDED, number=_NUMBER, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    for nested in message.nested_type:
        _grow(nested)


def _replace_wire(read: Callable[[Any], Any], say: Callable[[Any], bytes]) -> None:
    """Of this process: `say` makes the bytes of a message, `read` sees a message that came."""
    decoder = rpc._decoder

    def reading(kind: type[M]) -> Callable[[bytes], M]:
        decode = decoder(kind)
        return lambda data: read(decode(data))

    rpc._decoder, rpc._serialize = reading, say  # type: ignore[assignment]
    channel = grpc.aio._channel.Channel
    for name in _CALLS:
        setattr(channel, name, _calling(getattr(channel, name), read, say))


def _calling(call: Callable[..., Any], read: Callable[[Any], Any], say: Callable[[Any], bytes]) -> Callable[..., Any]:
    def calling(
        channel: Any, method: str, request_serializer: Any = None, response_deserializer: Any = None, **options: Any
    ) -> Any:
        if not method.startswith("/outrider."):
            return call(channel, method, request_serializer, response_deserializer, **options)
        return call(channel, method, say, lambda data: read(response_deserializer(data)), **options)

    return calling


def main() -> None:
    version, module, *_ = sys.argv[1:]
    del sys.argv[1:3]
    if version == "predecessor":
        _replace_wire(as_known_then, lambda message: bytes(as_known_then(message).SerializeToString()))
    elif version == "successor":
        _replace_wire(lambda message: message, as_said_later)
    else:
        sys.exit(f"{version} is neither predecessor nor successor")
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
