"""API keys at a coordinator: who is let in, whose session it is, and how much is enough."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from click.testing import CliRunner, Result
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import coordinator_pb2_grpc

from services.cli.commands import cli
from services.client import Access, GenerateOptions, OutriderClient, RetryPolicy
from services.common.api_keys import KeyOwner, KeyRing, Limits, new_key, write_ring
from services.common.errors import (
    FailedPrecondition,
    NotFound,
    OutriderError,
    ResourceExhausted,
    Unauthenticated,
)
from services.common.rpc_errors import error_from_rpc
from services.common.service import end_tasks, wait_until
from tests.integration.coordinator.conftest import TARGET, Cluster, node, start_cluster

__all__ = ["start_cluster"]  # the fixture

OPTIONS = GenerateOptions(max_tokens=8, ignore_eos=True)
ENDLESS = GenerateOptions(max_tokens=30_000, ignore_eos=True)
ONCE = RetryPolicy(max_attempts=1, max_attempts_unreached=1)
SERVICE = "outrider.v1.CoordinatorService"


class Keys:
    """The file, and the keys in it by their owners' names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owners: dict[str, KeyOwner] = {}
        self.texts: dict[str, str] = {}

    def add(self, name: str, **limits: Any) -> str:
        """One more key of `name`; the last one is `texts[name]`."""
        key, stored = new_key("today")
        owner = self._owners.get(name, KeyOwner(name))
        self._owners[name] = KeyOwner(name, Limits(**limits) if limits else owner.limits, (*owner.keys, stored))
        self.texts[name] = key
        self._write()
        return key

    def keep_last(self, name: str) -> None:
        owner = self._owners[name]
        self._owners[name] = replace(owner, keys=owner.keys[-1:])
        self._write()

    def _write(self) -> None:
        write_ring(self.path, KeyRing(self._owners.values()))


@dataclass(frozen=True, slots=True)
class Guarded:
    """A cluster that asks for keys."""

    cluster: Cluster
    keys: Keys

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.cluster.coordinator.port}"

    def client(self, key: str) -> OutriderClient:
        return OutriderClient(self.address, access=Access(api_key=key), retry=ONCE)

    def of(self, name: str) -> OutriderClient:
        return self.client(self.keys.texts[name])


@pytest.fixture
async def guarded(start_cluster: Callable[..., Any], tmp_path: Path) -> AsyncIterator[Guarded]:
    keys = Keys(tmp_path / "keys.json")
    keys.add("ann")
    keys.add("bob")
    slow = replace(TARGET, simulated_step_ms=2.0)
    async with start_cluster(target=slow, api_keys_file=str(keys.path)) as cluster:
        yield Guarded(cluster, keys)


def calls(stub: Any, metadata: Any) -> list[Any]:
    return [
        stub.Generate(pb.GenerateRequest(prompt="a"), metadata=metadata).read(),
        stub.GetSession(pb.GetSessionRequest(session_id=str(uuid.uuid4())), metadata=metadata),
        stub.CloseSession(pb.CloseSessionRequest(session_id=str(uuid.uuid4())), metadata=metadata),
        stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
        stub.GetClusterStatus(pb.GetClusterStatusRequest(), metadata=metadata),
    ]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["Bearer "],
        ["Bearer wrong"],
        ["Bearer outrider-000000000000-" + "A" * 43],
        ["Basic {key}"],
        ["{key}"],
        ["Bearer {key}x"],
        ["Bearer {key}", "Bearer {key}"],
        ["Bearer {swapped}"],
    ],
)
async def test_every_method_refuses_who_has_no_key_or_a_wrong_one(guarded: Guarded, headers: list[str]) -> None:
    ann, bob = guarded.keys.texts["ann"], guarded.keys.texts["bob"]
    swapped = ann[:22] + bob[22:]
    metadata = [("authorization", header.format(key=ann, swapped=swapped)) for header in headers]
    for call in calls(guarded.cluster.stub, metadata):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = error_from_rpc(caught.value)
        assert (type(error), error.reason) == (Unauthenticated, "BAD_CREDENTIALS")


async def test_an_unknown_client_is_refused_before_its_message_is_read(guarded: Guarded) -> None:
    """It need not even send one: memory and parsing are for those with a key."""
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        call = channel.stream_stream(f"/{SERVICE}/Generate")()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), 5)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_health_is_open_and_reflection_is_not(guarded: Guarded) -> None:
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_session_is_unknown_to_everybody_but_its_owner(guarded: Guarded) -> None:
    async with guarded.of("ann") as ann, guarded.of("bob") as bob:
        session = str(uuid.uuid4())
        first = await ann.complete("Hello", OPTIONS, session_id=session)
        assert (await ann.get_session(session)).request_id == first.request_id
        for stage in ("idle", "running", "closed"):
            running = None
            if stage == "running":
                generation = ann.generate(" go", ENDLESS, session_id=session, request_id=str(uuid.uuid4()))
                running = asyncio.create_task(generation.complete())
                assert await wait_until(lambda: guarded.cluster.coordinator.coordinator.num_running == 1, 10)
            if stage == "closed":
                await ann.close_session(session)
            attempts: list[Any] = [
                bob.get_session(session),
                bob.close_session(session),
                bob.complete("mine", OPTIONS, session_id=session),
                bob.generate("Hello", OPTIONS, session_id=session, request_id=first.request_id).complete(),
            ]
            for attempt in attempts:
                with pytest.raises(NotFound) as caught:
                    await attempt
                assert caught.value.reason == "UNKNOWN_SESSION"
                assert caught.value.message == f"no session {session}"
            if running is not None:
                assert not running.done()
                await end_tasks(running)
                assert await wait_until(lambda: guarded.cluster.coordinator.coordinator.num_running == 0, 10)
        await ann.close_session(session)
        with pytest.raises(FailedPrecondition, match="was closed"):
            await ann.complete("again", OPTIONS, session_id=session)


async def test_a_running_generation_is_not_taken_over_by_another_key(guarded: Guarded) -> None:
    """Even by one that knows session, request and parameters."""
    session, request = str(uuid.uuid4()), str(uuid.uuid4())
    options = replace(ENDLESS, seed=1)
    async with guarded.of("ann") as ann, guarded.of("bob") as bob:
        generation = ann.generate("Hello", options, session_id=session, request_id=request)
        running = asyncio.create_task(generation.complete())
        assert await wait_until(lambda: guarded.cluster.coordinator.coordinator.num_running == 1, 10)
        with pytest.raises(NotFound):
            await bob.generate("Hello", options, session_id=session, request_id=request).complete()
        assert not running.done()
        await end_tasks(running)


async def test_keys_change_without_a_restart_and_an_owner_keeps_its_sessions(guarded: Guarded) -> None:
    session = str(uuid.uuid4())
    old = guarded.keys.texts["ann"]
    async with guarded.client(old) as before:
        await before.complete("Hello", OPTIONS, session_id=session)
        new = guarded.keys.add("ann")
        async with guarded.client(new) as after:
            assert (await after.get_session(session)).session_id == session
            assert (await before.get_session(session)).session_id == session
            guarded.keys.keep_last("ann")
            assert (await after.get_session(session)).session_id == session
            with pytest.raises(Unauthenticated):
                await before.get_session(session)


async def test_a_broken_file_leaves_the_known_keys_valid(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    guarded.keys.path.write_text('{"version": 1, "owners": {"ann"')
    async with guarded.of("bob") as bob:
        assert await bob.list_models()
        guarded.keys.path.unlink()
        assert await bob.list_models()
    assert "changed API keys are not taken over" in caplog.text


async def test_refusals_at_the_door_are_counted_and_made_up_methods_as_one(guarded: Guarded) -> None:
    guarded.keys.add("ann", requests_per_s=0.1)
    async with guarded.of("ann") as ann:
        assert [await refusal_of(ann.list_models()) for _ in range(3)] == ["", "RATE_LIMITED", "RATE_LIMITED"]
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        for method in ("Generate", "Made", "Up"):
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(f"/{SERVICE}/{method}")(b"")
    registry = guarded.cluster.coordinator.registry

    def count(method: str, code: str, reason: str) -> float | None:
        labels = {"role": "coordinator", "method": method, "code": code, "reason": reason}
        return registry.get_sample_value("outrider_requests_total", labels)

    assert count("ListModels", "RESOURCE_EXHAUSTED", "RATE_LIMITED") == 2
    assert count("Generate", "UNAUTHENTICATED", "BAD_CREDENTIALS") == 1
    assert count("OTHER", "UNAUTHENTICATED", "BAD_CREDENTIALS") == 2


async def refusal_of(call: Awaitable[object]) -> str:
    """Why it was refused; empty where it was not."""
    try:
        await call
    except ResourceExhausted as error:
        return error.reason
    return ""


async def test_requests_are_limited_by_the_second(guarded: Guarded) -> None:
    guarded.keys.add("ann", requests_per_s=2.0)
    async with guarded.of("ann") as ann, guarded.of("bob") as bob:
        refusals = []
        for _ in range(6):
            try:
                await ann.list_models()
            except ResourceExhausted as error:
                refusals.append(error)
            await bob.list_models()
        assert len(refusals) >= 3
        assert {error.reason for error in refusals} == {"RATE_LIMITED"}
        assert all(error.retry_after_ms is not None and 0 < error.retry_after_ms <= 501 for error in refusals)


async def test_tokens_are_limited_by_the_minute_prompt_included(guarded: Guarded) -> None:
    guarded.keys.add("ann", tokens_per_min=60)
    async with guarded.of("ann") as ann, guarded.of("bob") as bob:
        await ann.complete("x" * 50, replace(OPTIONS, max_tokens=40))  # what runs is not cut off; the debt is paid back
        with pytest.raises(ResourceExhausted) as caught:
            await ann.complete("y", OPTIONS)
        assert caught.value.reason == "RATE_LIMITED"
        assert 25_000 < (caught.value.retry_after_ms or 0) <= 31_001
        assert (await bob.complete("y", OPTIONS)).tokens


async def test_sessions_at_once_are_limited_and_a_resumption_is_no_further_one(guarded: Guarded) -> None:
    guarded.keys.add("ann", max_sessions=1)
    session, request = str(uuid.uuid4()), str(uuid.uuid4())
    options = replace(ENDLESS, seed=1)
    coordinator = guarded.cluster.coordinator.coordinator
    async with guarded.of("ann") as ann, guarded.of("ann") as again:
        generation = ann.generate("Hello", options, session_id=session, request_id=request)
        running = asyncio.create_task(generation.complete())
        assert await wait_until(lambda: coordinator.num_running == 1, 10)
        with pytest.raises(ResourceExhausted) as caught:
            await again.complete("another", OPTIONS)
        assert caught.value.reason == "TOO_MANY_SESSIONS"
        assert caught.value.retry_after_ms
        takeover = asyncio.create_task(
            again.generate("Hello", options, session_id=session, request_id=request).complete()
        )
        with pytest.raises(OutriderError, match="taken the generation over"):
            await running
        await end_tasks(takeover)
        key = guarded.keys.texts["ann"]
        async with OutriderClient(guarded.address, access=Access(api_key=key)) as patient:  # waits as it is told to
            assert (await patient.complete("another", OPTIONS)).tokens


async def test_limits_hold_for_all_coordinators_together(guarded: Guarded, redis_url: str) -> None:
    guarded.keys.add("ann", max_sessions=1, tokens_per_min=60)
    key = guarded.keys.texts["ann"]
    coordinator = guarded.cluster.coordinator.coordinator
    async with (
        node(guarded.cluster, redis_url, api_keys_file=str(guarded.keys.path)) as other,
        OutriderClient(f"127.0.0.1:{other.port}", access=Access(api_key=key), retry=ONCE) as elsewhere,
    ):
        request = pb.GenerateRequest(prompt="Hello", max_tokens=30_000, ignore_eos=True)
        call = guarded.cluster.stub.Generate(request, metadata=[("authorization", f"Bearer {key}")])
        num_tokens = 0
        while num_tokens < 90:
            num_tokens += len((await call.read()).token_ids)
        assert await refusal_of(elsewhere.complete("another", OPTIONS)) in (
            "TOO_MANY_SESSIONS",
            "RATE_LIMITED",
        )  # the latter once it is reported
        call.cancel()
        assert await wait_until(lambda: coordinator.num_running == 0, 10)
        async with asyncio.timeout(5):  # it tells what it counted at the end, or a second later
            while (reason := await refusal_of(elsewhere.complete("another", OPTIONS))) != "RATE_LIMITED":
                assert reason in ("", "TOO_MANY_SESSIONS")


async def test_caches_of_different_keys_never_meet(guarded: Guarded) -> None:
    """A hit would tell by its speed what another key's owner has sent."""
    core = guarded.cluster.target.engine._core  # type: ignore[attr-defined]
    prompt = "A prompt of several blocks that both of them send. " * 8

    async def num_hits(name: str, salt: str = "") -> int:
        before = core.prefix_cache_stats.num_hit_tokens
        async with guarded.of(name) as client:
            await client.complete(prompt, replace(OPTIONS, cache_salt=salt))
        engine = guarded.cluster.target.engine
        assert await wait_until(lambda: engine.load.num_sequences == 0, 10)
        return int(core.prefix_cache_stats.num_hit_tokens - before)

    assert await num_hits("ann") == 0
    assert await num_hits("ann") >= 384
    assert await num_hits("bob") == 0
    assert await num_hits("ann", "one salt") == 0
    assert await num_hits("ann", "one salt") >= 384
    assert await num_hits("bob", "one salt") == 0


async def test_no_key_comes_into_logs_or_errors(guarded: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = guarded.keys.texts["ann"]
    wrong = key[:-4] + "AAAA"
    async with guarded.client(key) as good, guarded.client(wrong) as bad:
        await good.complete("Hello", OPTIONS)
        with pytest.raises(Unauthenticated) as caught:
            await bad.complete("Hello", OPTIONS)
        shown = repr(good) + repr(Access(api_key=key)) + repr(caught.value) + caught.value.message
    for secret in (key, wrong, key[22:40]):
        assert secret not in caplog.text
        assert secret not in shown
        assert secret not in guarded.keys.path.read_text()


async def test_the_command_line_takes_its_key_from_a_file_or_a_variable(guarded: Guarded, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(guarded.keys.texts["ann"] + "\n")

    async def run(*arguments: str, **environment: str) -> Result:
        env = {"OUTRIDER_ADDRESS": guarded.address, **environment}
        return await asyncio.to_thread(CliRunner().invoke, cli, arguments, env=env)

    for arguments in (["models", "--json"], ["top", "--once", "--interval", "0.1", "--json"]):
        assert (await run(*arguments, "--api-key-file", str(file))).exit_code == 0
        assert (await run(*arguments, OUTRIDER_API_KEY=guarded.keys.texts["bob"])).exit_code == 0
        refused = await run(*arguments)
        assert "BAD_CREDENTIALS" in str(refused.exception)
    answer = await run("generate", "Hello", "--max-tokens", "3", "--json", "--api-key-file", str(file))
    assert len(json.loads(answer.stdout)["token_ids"]) == 3


async def test_the_stub_alone_works_with_a_header(guarded: Guarded) -> None:
    metadata = (("authorization", f"bearer {guarded.keys.texts['ann']}"),)
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        assert (await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)).models
