from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import coordinator_pb2_grpc, sampling_pb2

from services.common import rpc_errors
from services.common.errors import Aborted, InvalidArgument, Unavailable
from services.common.service import wait_until
from tests.fakes import redis_process
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster

METHOD = "/outrider.v1.CoordinatorService/Generate"


def sampling(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a", "sampling": sampling_pb2.SamplingParams(**fields)}


@pytest.mark.parametrize(
    ("fields", "reason", "field", "limit"),
    [
        ({}, "INVALID_PARAMETER", "input", "one of prompt, chat and tokens"),
        ({"prompt": ""}, "INVALID_PARAMETER", "prompt", "empty"),
        ({"prompt": "x" * 10_000_000}, "PROMPT_TOO_LONG", "prompt", "1000000"),
        ({"prompt": "x" * 100_000}, "PROMPT_TOO_LONG", "prompt", "32767"),
        (sampling(temperature=-1.0), "INVALID_PARAMETER", "sampling.temperature", "[0, 100]"),
        (sampling(temperature=float("nan")), "INVALID_PARAMETER", "sampling.temperature", "[0, 100]"),
        (sampling(top_p=0.0), "INVALID_PARAMETER", "sampling.top_p", "(0, 1]"),
        ({"prompt": "a", "num_draft_tokens": 17}, "INVALID_PARAMETER", "num_draft_tokens", "16"),
        ({"tokens": pb.TokenInput(token_ids=[1, 257])}, "INVALID_PARAMETER", "tokens.token_ids", "257"),
        ({"prompt": "a", "fork": True}, "INVALID_PARAMETER", "session_id", "must be given"),
        ({"prompt": "a", "fork_len": 3}, "INVALID_PARAMETER", "fork_len", "fork"),
    ],
)
async def test_bad_requests_name_code_reason_field_and_limit_and_the_service_goes_on(
    cluster: Cluster, fields: dict[str, Any], reason: str, field: str, limit: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in cluster.stub.Generate(pb.GenerateRequest(**fields)):
            pass
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    error = rpc_errors.error_from_rpc(caught.value)
    assert (error.reason, error.field) == (reason, field)
    assert limit in error.message
    assert len((await cluster.generate(prompt="a", max_tokens=3, ignore_eos=True)).tokens) == 3


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x22\x02\xff\xfe"], ids=["garbage", "invalid UTF-8"])
async def test_undecodable_messages_are_the_clients_fault(cluster: Cluster, data: bytes) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.coordinator.port}") as channel:
        call = channel.unary_stream(METHOD)(data)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    error = rpc_errors.error_from_rpc(caught.value)
    assert isinstance(error, InvalidArgument)
    assert error.reason == "UNDECODABLE"


async def test_a_deadline_frees_the_generations_sequences(start_cluster: StartCluster) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=10.0)) as cluster:
        call = cluster.stub.Generate(pb.GenerateRequest(prompt="a", max_tokens=1000, ignore_eos=True), timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        engine = cluster.target.engine
        assert await wait_until(lambda: engine.load.num_sequences == 0, 1.0)


async def test_a_client_that_does_not_read_is_aborted_and_may_resume(start_cluster: StartCluster) -> None:
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]  # what the connection itself holds
    async with start_cluster(max_unread_tokens=16, slow_client_s=0.2) as cluster:
        request = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4()), "prompt": "a"}
        request |= {"max_tokens": 30_000, "ignore_eos": True, "num_draft_tokens": 0}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{cluster.coordinator.port}", options=narrow) as channel:
            call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).Generate(pb.GenerateRequest(**request))
            await call.read()
            coordinator, engine = cluster.coordinator.coordinator, cluster.target.engine
            assert await wait_until(lambda: coordinator.num_running == 0 and engine.load.num_sequences == 0, 60)
            session = await cluster.stub.GetSession(pb.GetSessionRequest(session_id=request["session_id"]))
            assert len(session.token_ids) < 30_000
            with pytest.raises(Aborted) as caught:
                await _drain(call)
        assert caught.value.reason == "SLOW_CLIENT"


async def _drain(call: Any) -> None:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
        await call.code()
    except grpc.aio.AioRpcError as error:
        raise rpc_errors.error_from_rpc(error) from error


async def test_a_lost_store_ends_generations_with_a_clear_error(start_cluster: StartCluster, tmp_path: Path) -> None:
    with redis_process.running(tmp_path) as server:
        slow, outage = replace(TARGET, simulated_step_ms=10.0), {"redis_outage": "stop", "redis_outage_after_s": 0.2}
        async with start_cluster(target=slow, redis_url=server.url, **outage) as cluster:
            running = asyncio.create_task(cluster.generate(prompt="a", max_tokens=3000, ignore_eos=True))
            coordinator = cluster.coordinator.coordinator
            assert await wait_until(lambda: coordinator.num_running == 1, 5)
            server.kill()
            with pytest.raises(Unavailable) as caught:
                await running
            assert caught.value.reason == "STORE_UNAVAILABLE"
            with pytest.raises(Unavailable) as refused:
                await cluster.generate(prompt="b")
            assert refused.value.reason == "STORE_UNAVAILABLE"
