"""Messages of this version and of its predecessor in each other's hands."""

from __future__ import annotations

import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import Default
from google.protobuf.message import Message
from outrider.v1 import coordinator_pb2, draft_pb2, sampling_pb2, target_pb2, worker_pb2

from tests.fakes.other_version import ADDED, as_said_later
from tests.predecessor import NAMES, filled, message_class

PRESENT = [coordinator_pb2, draft_pb2, sampling_pb2, target_pb2, worker_pb2]  # loaded, so that the pool knows them


def present_class(name: str) -> type[Message]:
    return message_factory.GetMessageClass(Default().FindMessageTypeByName(name))


def test_the_predecessor_knows_less() -> None:
    fields = [
        (len(message_class(name).DESCRIPTOR.fields), len(present_class(name).DESCRIPTOR.fields)) for name in NAMES
    ]
    assert all(then <= now for then, now in fields)
    assert any(then < now for then, now in fields)


@pytest.mark.parametrize("name", NAMES)
def test_the_predecessor_reads_what_it_knows_and_passes_on_what_it_does_not(name: str) -> None:
    then, now = message_class(name), present_class(name)
    for message in filled(now):
        read = then.FromString(message.SerializeToString())
        for field in then.DESCRIPTOR.fields:
            if field.message_type is None:
                assert getattr(read, field.name) == getattr(message, field.name), field.name
        assert now.FromString(read.SerializeToString()) == message


@pytest.mark.parametrize("name", NAMES)
def test_what_the_predecessor_says_is_understood_as_a_whole(name: str) -> None:
    then, now = message_class(name), present_class(name)
    for message in filled(then):
        read = now.FromString(message.SerializeToString())
        for field in then.DESCRIPTOR.fields:
            if field.message_type is None:
                assert getattr(read, field.name) == getattr(message, field.name), field.name
        assert then.FromString(read.SerializeToString()) == message


@pytest.mark.parametrize("name", NAMES)
def test_what_a_successor_says_is_understood_but_for_what_it_added(name: str) -> None:
    """The fakes of the rolling update: every message, however deep, has a field that its reader does not know."""
    for message in filled(present_class(name)):
        said = as_said_later(message)
        read = type(message).FromString(said)
        assert said.count(b"unknown to its reader") >= 1
        assert not hasattr(read, ADDED)
        assert len(read.SerializeToString()) > len(message.SerializeToString())
        read.DiscardUnknownFields()
        assert read == message
