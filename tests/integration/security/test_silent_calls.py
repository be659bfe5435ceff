"""Calls whose message never comes, from peers that are alive otherwise: they end, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from outrider.v1 import worker_pb2, worker_pb2_grpc

from services.common.errors import DeadlineExceeded, OutriderError, ResourceExhausted
from services.common.rpc import GrpcServer, ServerLimits, channel_options
from services.common.rpc_errors import error_from_rpc
from services.common.service import wait_until
from services.common.tally import CallKind, CallTally
from services.coordinator.open_calls import SPARE_CALLS
from tests import raw_http2 as h2
from tests.integration.coordinator.conftest import StartCluster, start_cluster
from tests.integration.security.test_api_keys import OPTIONS, Guarded, Keys

__all__ = ["start_cluster"]  # the fixture

WORKER = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
DESCRIBE = "/outrider.v1.WorkerService/GetWorkerInfo"
GENERATE = "/outrider.v1.CoordinatorService/Generate"
WATCH = "/grpc.health.v1.Health/Watch"
LIMITS = ServerLimits(max_streams_a_connection=16, max_concurrent_rpcs=24)
MAX_GENERATIONS = 4
MOST_A_CONNECTION = MAX_GENERATIONS + 2 * SPARE_CALLS


class Describing:
    """Answers at once."""

    async def GetWorkerInfo(self, request: object, context: object) -> worker_pb2.GetWorkerInfoResponse:
        return worker_pb2.GetWorkerInfoResponse(instance_id="x")


def serving(message_s: float, calls: CallTally | None = None) -> GrpcServer:
    limits = replace(LIMITS, message_s=message_s)
    server = GrpcServer("127.0.0.1", 0, limits=limits, stop_grace_s=0.0, calls=calls)
    server.add(WORKER, Describing())
    return server


async def describe(port: int) -> str:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        return (await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=10)).instance_id


def data(payload: bytes) -> Callable[[int], bytes]:
    return lambda stream: h2.frame(h2.DATA, 0, stream, payload)


UNSAID: dict[str, tuple[int, int, Callable[[int], bytes]]] = {
    "no message": (2, 16, lambda stream: b""),
    "half a message": (2, 16, data(h2.message(b"\x0a", 5))),
    "half a message's head": (2, 16, data(b"\x00\x00\x00")),
    "half a frame": (32, 1, lambda stream: data(h2.message(b"\x0a", 5))(stream)[:-2]),
}
"""Connections, calls on each, what is sent behind their headers. Amid a frame a peer can answer no pings."""


@pytest.mark.parametrize("name", UNSAID)
async def test_calls_whose_message_does_not_come_are_ended_and_make_room(name: str) -> None:
    tally, (num_connections, num_calls, more) = CallTally(), UNSAID[name]
    async with serving(1.0, tally) as server, contextlib.AsyncExitStack() as stack:
        flood = functools.partial(
            h2.calls, server.port, num_calls, h2.call_headers(DESCRIBE), more, answers_pings=num_calls > 1
        )
        ended = [await stack.enter_async_context(flood()) for _ in range(num_connections)]

        def num_ended() -> int:
            return sum(map(len, ended))

        assert await wait_until(lambda: num_ended() == 32 - LIMITS.max_concurrent_rpcs, 10)  # those too many
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await describe(server.port)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await wait_until(lambda: num_ended() == 32, 10)
        assert await describe(server.port) == "x"
    assert tally.counts[CallKind("GetWorkerInfo", "DEADLINE_EXCEEDED", "NO_MESSAGE")] == LIMITS.max_concurrent_rpcs


@pytest.mark.parametrize("part", [b"", h2.message(b"\x0a", 5)], ids=["nothing", "half a message"])
async def test_a_call_that_ends_without_its_message_is_answered(part: bytes) -> None:
    tally = CallTally()
    async with serving(60.0, tally) as server:
        reader, writer = await asyncio.open_connection("localhost", server.port)
        writer.write(h2.HELLO + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, h2.call_headers(DESCRIBE)))
        writer.write(h2.frame(h2.DATA, h2.END_STREAM, 1, part))
        assert await asyncio.wait_for(h2.stream_ends(reader, 1), 5)
        writer.close()
    assert dict(tally.counts) == {CallKind("GetWorkerInfo", "INVALID_ARGUMENT", "UNDECODABLE"): 1}


async def test_calls_that_are_taken_back_before_their_message_count_as_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tally = CallTally()
    async with serving(60.0, tally) as server:
        async with h2.calls(server.port, 16, h2.call_headers(DESCRIBE)):
            assert await describe(server.port) == "x"
        assert await describe(server.port) == "x"
    assert dict(tally.counts) == {CallKind("GetWorkerInfo", "OK", ""): 2}
    assert not caplog.records


async def test_a_late_call_is_told_what_was_awaited() -> None:
    async with serving(0.1) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.stream_stream(DESCRIBE)().read()
    error = error_from_rpc(caught.value)
    assert (type(error), error.reason, error.field) == (DeadlineExceeded, "NO_MESSAGE", "message")
    assert DESCRIBE in error.message
    assert "0.1 s" in error.message


async def test_a_watch_of_health_goes_on_once_its_message_has_come() -> None:
    async with serving(0.2) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch.read(), 0.6)


@pytest.fixture
async def guarded(start_cluster: StartCluster, tmp_path: Path) -> AsyncIterator[Guarded]:
    keys = Keys(tmp_path / "keys.json")
    keys.add("ann")
    keys.add("bob")
    async with start_cluster(api_keys_file=str(keys.path), max_generations=MAX_GENERATIONS) as cluster:
        yield Guarded(cluster, keys)


@contextlib.asynccontextmanager
async def flood(port: int, path: str, most: int, more: Callable[[int], bytes] | None = None, **metadata: str) -> Any:
    """Three connections with as many calls as each may have, of which `most` stay open."""
    headers = h2.call_headers(path, **metadata)
    async with contextlib.AsyncExitStack() as stack:
        floods = [h2.calls(port, MOST_A_CONNECTION, headers, more or (lambda stream: b"")) for _ in range(3)]
        ended = [await stack.enter_async_context(opened) for opened in floods]
        num_surplus = 3 * MOST_A_CONNECTION - most
        assert await wait_until(lambda: sum(map(len, ended)) >= num_surplus, 10)
        assert sum(map(len, ended)) == num_surplus
        yield


async def error_of(call: Any) -> OutriderError | None:
    try:
        await call
    except OutriderError as error:
        return error
    return None


@pytest.mark.parametrize(("max_sessions", "most"), [(0, SPARE_CALLS + MAX_GENERATIONS), (1, SPARE_CALLS + 2)])
async def test_an_owners_calls_take_nobody_elses_place(guarded: Guarded, max_sessions: int, most: int) -> None:
    guarded.keys.add("ann", max_sessions=max_sessions)
    key, port = {"authorization": f"Bearer {guarded.keys.texts['ann']}"}, guarded.cluster.coordinator.port
    async with guarded.of("ann") as ann, guarded.of("bob") as bob:
        async with flood(port, GENERATE, most, **key):
            refused = await error_of(ann.list_models())
            assert isinstance(refused, ResourceExhausted)
            assert refused.reason == "TOO_MANY_CALLS"
            assert f"{most} calls" in refused.message
            assert refused.retry_after_ms
            results = await asyncio.gather(*(bob.complete("a", OPTIONS) for _ in range(MAX_GENERATIONS)))
            assert all(len(result.tokens) == OPTIONS.max_tokens for result in results)
        assert await wait_until_served(ann)


async def test_watchers_without_a_key_take_nobody_elses_place(guarded: Guarded) -> None:
    port, asked = guarded.cluster.coordinator.port, data(h2.message(b""))
    async with guarded.of("bob") as bob, grpc.aio.insecure_channel(guarded.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        async with flood(port, WATCH, SPARE_CALLS, asked):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(health_pb2.HealthCheckRequest())
            assert error_from_rpc(caught.value).reason == "TOO_MANY_CALLS"
            assert len((await bob.complete("a", OPTIONS)).tokens) == OPTIONS.max_tokens
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    assert (await check(health_pb2.HealthCheckRequest())).status
                    break


async def wait_until_served(client: Any) -> bool:
    """Once the flood's connections are closed; the server hears of that in its own time."""
    async with asyncio.timeout(10):
        while isinstance(await error_of(client.list_models()), ResourceExhausted):
            pass
    return True
