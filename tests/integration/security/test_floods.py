"""Peers that are slow, silent or too many: they are let go, others are served meanwhile, and memory stays bounded."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import coordinator_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.client import GenerateOptions, OutriderClient
from services.common.errors import InvalidArgument
from services.common.rpc import MAX_PUBLIC_MESSAGE_BYTES, GrpcServer, ServerLimits, channel_options
from services.common.rpc_errors import error_from_rpc
from services.common.service import wait_until
from services.common.tls import server_credentials
from services.common.tls_files import TlsFiles
from tests import raw_http2 as h2
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster, cluster, start_cluster
from tests.integration.security.conftest import Peers

__all__ = ["cluster", "start_cluster"]  # fixtures

WORKER = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
DESCRIBE = "/outrider.v1.WorkerService/GetWorkerInfo"
GENERATE = "/outrider.v1.CoordinatorService/Generate"
LIMITS = ServerLimits(max_connections=40, max_streams_a_connection=16, max_concurrent_rpcs=24, handshake_s=1.0)


class Held:
    """Answers once it is let."""

    def __init__(self) -> None:
        self.num_held = 0
        self.let = asyncio.Event()

    async def GetWorkerInfo(self, request: object, context: object) -> worker_pb2.GetWorkerInfoResponse:
        self.num_held += 1
        await self.let.wait()
        return worker_pb2.GetWorkerInfoResponse(instance_id="x")


def serving(held: Held, **options: Any) -> GrpcServer:
    server = GrpcServer("127.0.0.1", 0, limits=LIMITS, stop_grace_s=0.0, **options)
    server.add(WORKER, held)
    return server


@pytest.fixture
async def secure(peers: Peers) -> AsyncIterator[tuple[GrpcServer, ssl.SSLContext]]:
    held = Held()
    held.let.set()
    own = peers.coordinator
    context = ssl.create_default_context(cafile=own.ca)
    context.set_alpn_protocols(["h2"])
    async with serving(held, credentials=server_credentials(TlsFiles(own.cert, own.key))) as server:
        yield server, context


async def describe(port: int, credentials: grpc.ChannelCredentials | None = None) -> str:
    options = channel_options()
    address = f"localhost:{port}"
    chan = (
        grpc.aio.secure_channel(address, credentials, options=options)
        if credentials
        else grpc.aio.insecure_channel(address, options=options)
    )
    async with chan:
        stub = worker_pb2_grpc.WorkerServiceStub(chan)
        return (await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=10)).instance_id


SLOW = {
    "silent": (b"", False),
    "half a TLS hello": (b"\x16\x03\x01\x02\x00\x01", False),
    "TLS and silence": (b"", True),
    "half a preface": (h2.PREFACE[:10], True),
    "a preface": (h2.PREFACE, True),
}


@pytest.mark.parametrize("name", SLOW)
async def test_a_handshake_that_is_never_finished_is_cut_off(
    secure: tuple[GrpcServer, ssl.SSLContext], name: str
) -> None:
    server, context = secure
    data, tls = SLOW[name]
    assert await h2.seconds_until_closed(server.port, data, tls=context if tls else None) < 5


async def test_many_slow_peers_keep_nobody_else_out(secure: tuple[GrpcServer, ssl.SSLContext], peers: Peers) -> None:
    server, context = secure
    credentials = grpc.ssl_channel_credentials(peers.ca.cert_pem.bytes())
    slow = [
        asyncio.create_task(h2.seconds_until_closed(server.port, data, tls=context if tls else None))
        for data, tls in SLOW.values()
        for _ in range(6)
    ]
    assert await asyncio.wait_for(describe(server.port, credentials), 5) == "x"
    assert max(await asyncio.gather(*slow)) < 5


@pytest.mark.parametrize("answers_pings", [False, True])
async def test_half_sent_headers_end_the_connection(answers_pings: bool) -> None:
    """By keepalive where the peer is silent; a peer that answers breaks the protocol, which allows nothing between."""
    half = h2.HELLO + h2.frame(h2.HEADERS, 0, 1, h2.call_headers(DESCRIBE)[:9])
    async with serving(Held()) as server:
        assert await h2.seconds_until_closed(server.port, half, answers_pings=answers_pings) < 20


async def test_connections_are_bounded_and_the_bound_frees_itself() -> None:
    held = Held()
    held.let.set()
    async with serving(held) as server:
        tasks = [asyncio.create_task(h2.seconds_until_closed(server.port, b"")) for _ in range(60)]
        times = await asyncio.gather(*tasks)
        assert sum(seconds < 0.5 for seconds in times) >= 10  # those beyond the bound are not kept for a second
        assert await describe(server.port) == "x"


async def test_calls_are_bounded_on_a_connection_and_in_all() -> None:
    held = Held()
    async with serving(held) as server:
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=channel_options()) for _ in range(3)]
        first, *others = [worker_pb2_grpc.WorkerServiceStub(chan) for chan in channels]

        async def ask(stub: Any) -> str:
            try:
                return str((await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())).instance_id)
            except grpc.aio.AioRpcError as error:
                return error.code().name

        waiting = [asyncio.create_task(ask(first)) for _ in range(200)]
        assert await wait_until(lambda: held.num_held == LIMITS.max_streams_a_connection, 10)
        waiting += [asyncio.create_task(ask(stub)) for stub in others for _ in range(50)]
        assert await wait_until(lambda: any(task.done() for task in waiting), 10)
        assert held.num_held <= LIMITS.max_concurrent_rpcs
        held.let.set()
        answers = Counter(await asyncio.gather(*waiting))
        assert answers["RESOURCE_EXHAUSTED"] > 0
        assert set(answers) <= {"x", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}  # the last: before a client knows the bound
        for chan in channels:
            await chan.close()


async def test_calls_that_pile_up_before_a_busy_server_are_bounded_and_those_beyond_cancelled() -> None:
    held, limits = Held(), replace(LIMITS, max_pending_calls=2)
    held.let.set()
    turned_away = threading.Event()
    server = GrpcServer("127.0.0.1", 0, limits=limits, stop_grace_s=0.0)
    server.add(WORKER, held)
    async with server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            calls = [stub.GetWorkerInfo.future(worker_pb2.GetWorkerInfoRequest()) for _ in range(12)]
            for call in calls:
                call.add_done_callback(lambda _: turned_away.set())
            assert turned_away.wait(10)  # the event loop stands still, so that none of them is accepted
            assert await wait_until(lambda: all(call.done() for call in calls), 10)
        answers = Counter(call.code().name for call in calls)
    assert set(answers) == {"OK", "CANCELLED"}
    assert answers["CANCELLED"] >= 12 - 3 * limits.max_pending_calls - 1


async def test_a_flood_of_generations_is_refused_beyond_the_limit(start_cluster: StartCluster) -> None:
    target = replace(TARGET, simulated_step_ms=1.0)  # one that takes no time leaves more unread than it may
    settings = {"max_generations": 4, "max_unread_tokens": 4, "slow_client_s": 60, "heartbeat_ms": 50}
    async with start_cluster(target, **settings) as running:
        requests = [running.stub.Generate(pb.GenerateRequest(prompt="a", max_tokens=30_000)) for _ in range(200)]

        async def first(call: Any) -> str:
            try:
                while not (await call.read()).HasField("started"):  # signs of life come before it
                    pass
                return "started"
            except grpc.aio.AioRpcError as error:
                return error_from_rpc(error).reason

        begun = [asyncio.create_task(first(call)) for call in requests]
        answers = Counter(await asyncio.wait_for(asyncio.gather(*begun), 60))
        assert answers["QUEUE_FULL"] > 0
        assert set(answers) <= {"started", "QUEUE_FULL", "STREAM_BROKEN", "RESOURCE_EXHAUSTED"}
        assert answers["started"] == 4
        assert running.coordinator.coordinator.num_running == 4
        for call in requests:
            call.cancel()
        assert await wait_until(lambda: running.coordinator.coordinator.num_running == 0, 10)


async def test_calls_opened_and_reset_at_once_leave_nothing(cluster: Cluster) -> None:
    """Rapid reset: 20,000 calls that live for a moment each."""
    process = psutil.Process()
    port = cluster.coordinator.port
    headers = h2.call_headers(GENERATE)

    async def flood(num_calls: int) -> None:
        _, writer = await asyncio.open_connection("localhost", port)
        writer.write(h2.HELLO)
        for stream in range(1, 2 * num_calls, 2):
            writer.write(h2.frame(h2.HEADERS, h2.END_HEADERS, stream, headers))
            writer.write(h2.frame(h2.RST_STREAM, 0, stream, b"\x00\x00\x00\x08"))
            if stream % 200 == 1:
                try:
                    await writer.drain()
                except ConnectionError:  # refused to go on, which is as good
                    break
        writer.close()

    await flood(2_000)
    before = process.memory_info().rss
    for _ in range(9):
        await flood(2_000)
    async with OutriderClient(f"127.0.0.1:{port}") as client:  # which tries again where the backlog made a victim of it
        assert len((await client.complete("a", GenerateOptions(max_tokens=3, ignore_eos=True))).tokens) == 3
    assert process.memory_info().rss - before < 64 << 20


@pytest.mark.parametrize(("size", "code"), [(MAX_PUBLIC_MESSAGE_BYTES + 1, "RESOURCE_EXHAUSTED"), (100_000, None)])
async def test_oversized_messages_are_refused_and_the_service_goes_on(
    cluster: Cluster, size: int, code: str | None
) -> None:
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.coordinator.port}", options=options) as channel:
        call = channel.unary_stream(GENERATE)(pb.GenerateRequest(prompt="x" * size).SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        error = error_from_rpc(caught.value)
        assert caught.value.code().name == code if code else isinstance(error, InvalidArgument)
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        assert (await stub.ListModels(pb.ListModelsRequest())).models


MALFORMED: dict[str, Callable[[], bytes]] = {
    "a length without a message": lambda: h2.message(b"", 1 << 31, 0),
    "compressed without an encoding": lambda: h2.message(b"abc", 3, 1),
    "an unknown flag": lambda: h2.message(b"abc", 3, 0xFF),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_frames_end_their_call_alone(cluster: Cluster, name: str) -> None:
    data = MALFORMED[name]()
    reader, writer = await asyncio.open_connection("localhost", cluster.coordinator.port)
    writer.write(h2.HELLO + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, h2.call_headers(GENERATE)))
    writer.write(h2.frame(h2.DATA, 1, 1, data))  # and the end of the stream
    assert await asyncio.wait_for(h2.stream_ends(reader, 1), 10), "closed before its call was answered"
    writer.close()
    assert len((await cluster.generate(prompt="a", max_tokens=3, ignore_eos=True)).tokens) == 3
