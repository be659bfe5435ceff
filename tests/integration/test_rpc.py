"""Errors, undecodable messages, health and reflection of a real server on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from outrider.v1 import draft_pb2, draft_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.common.errors import Aborted, InvalidArgument, OutriderError, ResourceExhausted, Unavailable
from services.common.rpc import GrpcServer, channel_options
from services.common.rpc_errors import error_from_rpc

WORKER = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]
DRAFT = draft_pb2.DESCRIPTOR.services_by_name["DraftService"]


class Failing:
    """Raises what it is given; echoes streams."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def GetWorkerInfo(self, request: object, context: object) -> worker_pb2.GetWorkerInfoResponse:
        if self.error:
            raise self.error
        return worker_pb2.GetWorkerInfoResponse(instance_id="x")

    async def DraftStream(self, requests: AsyncIterator, context: object) -> AsyncIterator:
        async for request in requests:
            if self.error:
                raise self.error
            yield draft_pb2.DraftStreamResponse(
                results=[draft_pb2.DraftResult(identity=p.identity) for p in request.proposes]
            )


def server(error: Exception | None = None) -> GrpcServer:
    servicer = Failing(error)
    grpc_server = GrpcServer("127.0.0.1", 0, stop_grace_s=0.1)
    grpc_server.add(WORKER, servicer)
    grpc_server.add(DRAFT, servicer)
    return grpc_server


def channel(port: int) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options())


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("PROMPT_TOO_LONG", "prompt has 9 tokens, the limit is 8", field="prompt"),
        ResourceExhausted("QUEUE_FULL", "256 generations are running", retry_after_ms=1500),
        Aborted("STALE", "older than attempt 3", metadata={"attempt": "3"}),
        Unavailable("DRAINING", "the worker stops"),
    ],
)
async def test_an_error_arrives_as_it_was_raised(error: OutriderError) -> None:
    async with server(error) as running, channel(running.port) as chan:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await worker_pb2_grpc.WorkerServiceStub(chan).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
    back = error_from_rpc(raised.value)
    assert type(back) is type(error)
    assert (back.reason, back.message, back.field) == (error.reason, error.message, error.field)
    assert (back.retry_after_ms, back.metadata) == (error.retry_after_ms, error.metadata)


def _details(code: int = 14, message: str = "no", detail: any_pb2.Any | None = None) -> bytes:
    return status_pb2.Status(code=code, message=message, details=[detail] if detail else ()).SerializeToString()


@pytest.mark.parametrize(
    "details",
    [
        b"\xff\xff",
        _details(code=9),
        _details(message="another"),
        _details(detail=any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")),
    ],
    ids=["undecodable", "of another code", "with another message", "with an undecodable detail"],
)
def test_details_that_a_proxy_has_spoilt_leave_the_errors_code_and_message(details: bytes) -> None:
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", details))
    told = error_from_rpc(grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailers, "no"))
    assert isinstance(told, Unavailable)
    assert (told.reason, told.message) == ("STREAM_BROKEN", "no")


async def test_an_error_in_a_stream_ends_it_with_its_status() -> None:
    async with server(Aborted("STALE", "old")) as running, channel(running.port) as chan:
        call = draft_pb2_grpc.DraftServiceStub(chan).DraftStream(iter([draft_pb2.DraftStreamRequest()]))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            [response async for response in call]
    assert error_from_rpc(raised.value).reason == "STALE"


async def test_a_defect_is_internal_and_tells_the_client_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    async with server(ZeroDivisionError("secret")) as running, channel(running.port) as chan:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await worker_pb2_grpc.WorkerServiceStub(chan).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())
    error = error_from_rpc(raised.value)
    assert (error.code, error.reason) == (13, "DEFECT")
    assert "secret" not in error.message
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    "method", ["/outrider.v1.WorkerService/GetWorkerInfo", "/outrider.v1.DraftService/DraftStream"]
)
async def test_an_undecodable_message_is_an_invalid_argument_and_the_server_goes_on(method: str) -> None:
    async with server() as running, channel(running.port) as chan:
        streams = method.endswith("Stream")
        call = (
            chan.stream_stream(method)(iter([b"\xff\xff\xff"]))
            if streams
            else chan.unary_unary(method)(b"\xff\xff\xff")
        )
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await (call.read() if streams else call)
        error = error_from_rpc(raised.value)
        assert (type(error), error.reason) == (InvalidArgument, "UNDECODABLE")
        stub = worker_pb2_grpc.WorkerServiceStub(chan)
        assert (await stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest())).instance_id == "x"


async def test_health_tells_alive_from_ready() -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    async with server() as running, channel(running.port) as chan:
        stub = health_pb2_grpc.HealthStub(chan)

        async def status(name: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        assert await status("") == serving
        assert await status("outrider.v1.DraftService") == not_serving
        await running.set_ready(True)
        assert await status("outrider.v1.DraftService") == serving
        await running.set_ready(False)
        assert await status("outrider.v1.DraftService") == not_serving
        assert await status("") == serving


async def test_reflection_names_the_services() -> None:
    async with server() as running, channel(running.port) as chan:
        stub = reflection_pb2_grpc.ServerReflectionStub(chan)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        responses = [r async for r in stub.ServerReflectionInfo(iter([request]))]
    names = {service.name for service in responses[0].list_services_response.service}
    assert {"outrider.v1.WorkerService", "outrider.v1.DraftService", "grpc.health.v1.Health"} <= names


async def test_two_servers_never_share_a_port() -> None:
    async with server() as running:
        second = GrpcServer("127.0.0.1", running.port)
        with pytest.raises(OSError, match=str(running.port)):
            await second.__aenter__()
        await second.__aexit__()


async def test_an_unreachable_server_is_unavailable() -> None:
    async with server() as running:
        port = running.port
    async with channel(port) as chan:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await worker_pb2_grpc.WorkerServiceStub(chan).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=5)
    error = error_from_rpc(raised.value)
    assert (type(error), error.reason) == (Unavailable, "STREAM_BROKEN")
