"""Who gets through the handshakes, and who may then call what."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from outrider.v1 import target_pb2, target_pb2_grpc, worker_pb2, worker_pb2_grpc

from services.client import Access, GenerateOptions, OutriderClient, RetryPolicy
from services.common.channels import Channels
from services.common.errors import ConfigError, OutriderError, PermissionDenied, Unavailable
from services.common.rpc_errors import error_from_rpc
from services.common.tls_files import TlsFiles
from services.common.worker_server import RunningWorker
from services.coordinator.worker_link import DRAFT_CODEC, TARGET_CODEC, WorkerLink
from services.target.server import running_target
from tests.certificates import Files, expired, files, uri_files
from tests.integration.security.conftest import TARGET, Peers, StartSecure

ONCE = RetryPolicy(max_attempts_unreached=1)


@pytest.fixture
async def worker(peers: Peers) -> AsyncIterator[RunningWorker]:
    async with running_target(replace(TARGET, probe_port="0", **peers.named("target").settings)) as running:
        yield running


def channel(port: int, of: Files, name: str = "target") -> grpc.aio.Channel:
    return Channels(TlsFiles(of.cert, of.key, of.ca), name=name).open(f"127.0.0.1:{port}")


async def describe(chan: grpc.aio.Channel) -> worker_pb2.GetWorkerInfoResponse:
    try:
        return await worker_pb2_grpc.WorkerServiceStub(chan).GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=5)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def test_a_whole_cluster_speaks_mutual_tls(start_secure: StartSecure) -> None:
    async with start_secure(replace(TARGET, simulated_step_ms=5.0)) as cluster, cluster.client() as client:
        result = await client.complete("Hello", GenerateOptions(max_tokens=40, num_draft_tokens=4, ignore_eos=True))
        assert len(result.tokens) == 40
        assert result.statistics.num_drafts > 0


async def test_a_coordinator_may_call_a_worker(worker: RunningWorker, peers: Peers) -> None:
    async with channel(worker.port, peers.named("coordinator")) as chan:
        assert (await describe(chan)).instance_id


def foreign(peers: Peers, other: trustme.CA) -> Files:
    return files(peers.directory / "foreign", other.issue_cert("coordinator"), peers.ca)


def outdated(peers: Peers, other: trustme.CA) -> Files:
    return files(peers.directory / "outdated", expired(peers.ca, "coordinator"), peers.ca)


def nameless(peers: Peers, other: trustme.CA) -> Files:
    return Files("", "", peers.named("coordinator").ca)


@pytest.mark.parametrize("make", [foreign, outdated, nameless])
async def test_who_has_no_valid_certificate_gets_no_connection(
    worker: RunningWorker, peers: Peers, other_ca: trustme.CA, make: Any
) -> None:
    async with channel(worker.port, make(peers, other_ca)) as chan:
        with pytest.raises(Unavailable):
            await describe(chan)


async def test_plaintext_gets_no_connection(worker: RunningWorker) -> None:
    async with Channels().open(f"127.0.0.1:{worker.port}") as chan:
        with pytest.raises(Unavailable):
            await describe(chan)


STRANGERS = ["draft", "target", "client", "coordinator.evil", "xcoordinator"]


def num_handled(worker: RunningWorker) -> int:
    """Calls that have reached a method of the worker's, however they ended."""
    calls = next(metric for metric in worker.registry.collect() if metric.name == "outrider_requests")
    return int(sum(sample.value for sample in calls.samples))


async def reason_of(call: Awaitable[object]) -> str:
    """The reason with which a call was refused; empty if it was answered."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error).reason
    return ""


@pytest.mark.parametrize("name", STRANGERS)
async def test_a_valid_certificate_of_another_role_may_call_nothing_of_a_worker(
    worker: RunningWorker, peers: Peers, name: str
) -> None:
    async with channel(worker.port, peers.named(name)) as chan:
        stub = worker_pb2_grpc.WorkerServiceStub(chan)
        assert await reason_of(stub.GetWorkerInfo(worker_pb2.GetWorkerInfoRequest(), timeout=5)) == "WRONG_PEER"
        health = health_pb2_grpc.HealthStub(chan)
        assert await reason_of(health.Check(health_pb2.HealthCheckRequest(), timeout=5)) == "WRONG_PEER"
        stream = target_pb2_grpc.TargetServiceStub(chan).TargetStream(timeout=5)
        assert await reason_of(stream.read()) == "WRONG_PEER"
        reflection = reflection_pb2_grpc.ServerReflectionStub(chan).ServerReflectionInfo(timeout=5)
        assert await reason_of(reflection.read()) == "WRONG_PEER"
    assert num_handled(worker) == 0


async def test_what_a_stranger_writes_to_a_stream_is_never_answered(worker: RunningWorker, peers: Peers) -> None:
    """Writing while the refusal is on its way, gRPC's client may end the call with an INTERNAL of its own instead."""
    async with channel(worker.port, peers.named("draft")) as chan:
        stub = target_pb2_grpc.TargetServiceStub(chan)
        for _ in range(20):
            requests = iter([target_pb2.TargetStreamRequest()] * 3)
            assert await reason_of(stub.TargetStream(requests, timeout=5).read()) in ("WRONG_PEER", "INTERNAL")
    async with channel(worker.port, peers.named("coordinator")) as chan:
        assert num_handled(worker) == 0
        assert (await describe(chan)).instance_id
        assert num_handled(worker) == 1


async def test_an_address_or_a_common_name_is_no_name(worker: RunningWorker, peers: Peers) -> None:
    leaf = peers.ca.issue_cert("coordinator@example.org", common_name="coordinator")
    async with channel(worker.port, files(peers.directory / "mail", leaf, peers.ca)) as chan:
        with pytest.raises(PermissionDenied):
            await describe(chan)


async def test_names_may_be_uris_and_have_wildcards(peers: Peers, ca: trustme.CA) -> None:
    pattern = "spiffe://cluster.local/ns/*/sa/coordinator"
    config = replace(TARGET, tls_coordinator_names=pattern, **peers.named("target").settings)
    good = uri_files(peers.directory / "good", ca, "spiffe://cluster.local/ns/outrider/sa/coordinator")
    bad = uri_files(peers.directory / "bad", ca, "spiffe://cluster.local/ns/a/sa/evil/sa/coordinator")
    async with running_target(config) as running:
        async with channel(running.port, good) as chan:
            assert (await describe(chan)).instance_id
        async with channel(running.port, bad) as chan:
            with pytest.raises(PermissionDenied):
                await describe(chan)


@pytest.mark.parametrize(("codec", "name"), [(TARGET_CODEC, "draft"), (DRAFT_CODEC, "target")])
async def test_a_coordinator_trusts_no_worker_of_another_name(peers: Peers, codec: Any, name: str) -> None:
    """A draft's stolen certificate makes no target, and the other way round."""
    own = peers.coordinator
    async with running_target(replace(TARGET, **peers.named(name).settings)) as running:
        wanted = codec.role
        channels = Channels(TlsFiles(own.cert, own.key, own.ca), name=wanted)
        link = WorkerLink(f"127.0.0.1:{running.port}", codec, channels)
        link.start()
        try:
            assert not await link.wait_up(1.0)
            assert link.trouble.reason == "STREAM_BROKEN"
        finally:
            await link.aclose()


async def test_a_client_trusts_no_other_host_and_no_other_authority(
    start_secure: StartSecure, peers: Peers, other_ca: trustme.CA
) -> None:
    foreign_ca = files(peers.directory / "x", other_ca.issue_cert("x"), other_ca).ca
    async with start_secure() as cluster:
        for address, tls_ca in (("127.0.0.1", cluster.access.tls_ca), ("localhost", foreign_ca)):
            target = f"{address}:{cluster.coordinator.port}"  # which listens on both, and is known by one name
            async with OutriderClient(target, retry=ONCE, access=Access(tls_ca=tls_ca)) as client:
                with pytest.raises(Unavailable):
                    await client.complete("a")


async def test_clients_need_a_certificate_where_an_authority_for_them_is_named(
    start_secure: StartSecure, peers: Peers, other_ca: trustme.CA, tmp_path: Path
) -> None:
    clients = files(tmp_path / "client", other_ca.issue_cert("somebody"), peers.ca)
    client_ca = files(tmp_path / "authority", other_ca.issue_cert("unused"), other_ca).ca
    async with start_secure(tls_client_ca=client_ca) as cluster:
        async with cluster.client(clients.access) as client:
            assert await client.list_models()
        for access in (cluster.access, peers.named("coordinator").access):
            async with cluster.client(access) as client:
                with pytest.raises(Unavailable):
                    await client.list_models()


async def test_the_probe_answers_health_in_plaintext_and_nothing_else(worker: RunningWorker) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{worker.server.probe_port}") as chan:
        response = await health_pb2_grpc.HealthStub(chan).Check(
            health_pb2.HealthCheckRequest(service="outrider.v1.TargetService")
        )
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(OutriderError) as caught:
            await describe(chan)
        assert caught.value.reason == "UNIMPLEMENTED"


async def test_old_versions_of_tls_are_refused(worker: RunningWorker, peers: Peers) -> None:
    own = peers.named("coordinator")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(own.ca)
    context.load_cert_chain(own.cert, own.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("DEFAULT:@SECLEVEL=0")

    def greet() -> str | None:
        with socket.create_connection(("127.0.0.1", worker.port), 5) as raw, context.wrap_socket(raw) as tls:
            return tls.version()

    assert greet() == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="EOF"):
        greet()


def test_a_file_that_fits_nothing_stops_the_start(peers: Peers) -> None:
    own, other = peers.named("coordinator"), peers.named("target")
    with pytest.raises(ConfigError, match="tls_key"):
        TlsFiles(own.cert, other.key, own.ca)
    with pytest.raises(ConfigError, match="tls_ca"):
        TlsFiles(own.cert, own.key, own.key)
    with pytest.raises(ConfigError, match="No such file"):
        TlsFiles(own.cert, own.key, own.ca + ".none")
