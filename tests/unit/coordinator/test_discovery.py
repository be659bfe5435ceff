"""Names that are resolved again and again, and what EndpointSlices say."""

from __future__ import annotations

import asyncio
import socket
from contextlib import aclosing
from typing import Any

import pytest

from services.coordinator.discovery import DnsDiscovery, Endpoint, StaticDiscovery
from services.coordinator.endpoint_slices import SliceTable
from tests.fakes.kubernetes_api import endpoint_slice


async def test_a_static_address_is_told_once() -> None:
    assert [endpoints async for endpoints in StaticDiscovery("a:1").watch()] == [{Endpoint("a:1")}]


async def test_a_name_is_resolved_again_and_what_is_known_holds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = socket.gaierror(socket.EAI_NONAME, "unknown")
    answers: list[Any] = [failed, ["10.0.0.1"], ["10.0.0.1"], failed, failed, [], ["10.0.0.1", "fd00::2"]]

    async def resolve(host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answer]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    async with aclosing(DnsDiscovery("workers", 7, 0.001).watch()) as changes, asyncio.timeout(5):
        assert await anext(changes) == {Endpoint("10.0.0.1:7")}
        assert await anext(changes) == {Endpoint("10.0.0.1:7"), Endpoint("[fd00::2]:7")}
    assert not answers
    assert caplog.text.count("cannot be resolved") == 2  # once for each time that it began


async def test_localhost_is_really_resolved() -> None:
    async with aclosing(DnsDiscovery("localhost", 7, 60).watch()) as changes:
        assert Endpoint("127.0.0.1:7") in await anext(changes)


@pytest.mark.parametrize(
    ("conditions", "draining"),
    [
        ({}, False),
        ({"ready": None, "serving": None, "terminating": None}, False),
        ({"ready": True, "serving": True, "terminating": False}, False),
        ({"ready": False}, True),
        ({"ready": False, "serving": True, "terminating": True}, True),
        ({"ready": False, "serving": False, "terminating": True}, True),
        ({"ready": True, "serving": False}, True),
        ({"ready": False, "serving": True}, False),
    ],
)
def test_conditions_say_who_gets_nothing_new(conditions: dict[str, bool | None], draining: bool) -> None:
    table = SliceTable("grpc")
    table.replace([endpoint_slice("s", "10.0.0.1", **conditions)])
    assert table.endpoints == {Endpoint("10.0.0.1:50052", draining)}


def test_slices_are_replaced_changed_and_deleted_one_by_one() -> None:
    table = SliceTable("9")
    table.replace([endpoint_slice("s", "10.0.0.1"), endpoint_slice("t", "10.0.0.2")])
    table.change("MODIFIED", endpoint_slice("s", "10.0.0.3"))
    table.change("ADDED", endpoint_slice("u", "fd00::1"))
    table.change("BOOKMARK", {"metadata": {}})
    assert {e.address for e in table.endpoints} == {"10.0.0.3:9", "10.0.0.2:9", "[fd00::1]:9"}
    table.change("DELETED", endpoint_slice("t"))
    assert {e.address for e in table.endpoints} == {"10.0.0.3:9", "[fd00::1]:9"}
    table.replace([])
    assert not table.endpoints


def test_an_endpoint_that_stands_in_two_slices_drains_where_it_does_in_both() -> None:
    table = SliceTable("grpc")
    table.replace([endpoint_slice("s", "10.0.0.1", ready=False), endpoint_slice("t", "10.0.0.1")])
    assert table.endpoints == {Endpoint("10.0.0.1:50052")}


def test_a_slice_without_the_ports_name_has_no_endpoints() -> None:
    table = SliceTable("http")
    table.replace([endpoint_slice("s", "10.0.0.1"), {"metadata": {"name": "empty"}, "endpoints": None, "ports": None}])
    assert not table.endpoints
