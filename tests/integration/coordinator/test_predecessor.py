"""A version beside its predecessor's stubs: clients and workers that know only the fields of then."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import draft_pb2, sampling_pb2, target_pb2

from services.common import wire, wire_draft, wire_target
from services.common.rpc import channel_options
from services.common.worker import ItemStream, WorkerState
from services.common.worker_server import Recipe, RunningWorker, running_worker
from services.draft import server as draft_server
from services.target import server as target_server
from tests.integration.coordinator.conftest import DRAFT, TARGET, Cluster, node
from tests.predecessor import as_known_then, message_class

SERVICE = "outrider.v1.CoordinatorService"
REQUEST: dict[str, Any] = {
    "prompt": "Once upon a time",
    "max_tokens": 60,
    "ignore_eos": True,
    "sampling": sampling_pb2.SamplingParams(temperature=1.0, seed=7),
}


class OldClient:
    """Speaks to a coordinator in the predecessor's messages."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def _types(self, method: str) -> tuple[type[Any], type[Any]]:
        return message_class(f"outrider.v1.{method}Request"), message_class(f"outrider.v1.{method}Response")

    async def call(self, method: str, **fields: Any) -> Any:
        request, response = self._types(method)
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request.SerializeToString,
            response.FromString,
        )
        return await call(request(**fields))

    async def generate(self, **fields: Any) -> list[Any]:
        request, response = self._types("Generate")
        sampling = message_class("outrider.v1.SamplingParams")
        fields["sampling"] = sampling.FromString(fields["sampling"].SerializeToString())
        call = self._channel.unary_stream(
            f"/{SERVICE}/Generate",
            request.SerializeToString,
            response.FromString,
        )
        return [part async for part in call(request(**fields))]


async def test_a_client_of_the_predecessor_is_served_as_any_other(cluster: Cluster) -> None:
    whole = await cluster.generate(**REQUEST)
    ids = {"session_id": str(uuid.uuid4()), "request_id": str(uuid.uuid4())}
    address = f"127.0.0.1:{cluster.coordinator.port}"
    async with grpc.aio.insecure_channel(address, options=channel_options()) as channel:
        client = OldClient(channel)
        parts = await client.generate(**REQUEST, **ids)
        assert [token for part in parts for token in part.token_ids] == whole.tokens
        assert "".join(part.text for part in parts) == whole.text
        assert parts[-1].finished.reason == whole.finished.reason == pb.FINISH_REASON_LENGTH
        again = await client.generate(**REQUEST, **ids)
        assert [token for part in again for token in part.token_ids] == whole.tokens
        assert [model.name for model in (await client.call("ListModels")).models] == [whole.started.model]
        session = await client.call("GetSession", session_id=ids["session_id"])
        assert list(session.token_ids[session.prompt_len :]) == whole.tokens
        await client.call("CloseSession", session_id=ids["session_id"])


class OldTarget:
    """The target's servicer with the predecessor's eyes and mouth."""

    def __init__(self, state: WorkerState) -> None:
        self._stream: ItemStream[Any, Any, Any] = ItemStream(
            state,
            lambda request, opens: wire_target.decode_items(as_known_then(request), opens),
            lambda results, load: as_known_then(wire_target.encode_results(results, load)),
        )

    def TargetStream(self, requests: Any, context: object) -> AsyncIterator[Any]:
        return self._stream.serve(requests)


class OldDraft:
    """The draft's."""

    def __init__(self, state: WorkerState) -> None:
        self._stream: ItemStream[Any, Any, Any] = ItemStream(
            state,
            lambda request, opens: wire_draft.decode_items(as_known_then(request), opens),
            lambda results, load: as_known_then(wire_draft.encode_results(results, load)),
        )

    def DraftStream(self, requests: Any, context: object) -> AsyncIterator[Any]:
        return self._stream.serve(requests)


@pytest.fixture
async def old_workers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[RunningWorker, RunningWorker]]:
    describe = wire.info_to_proto
    monkeypatch.setattr(wire, "info_to_proto", lambda info: as_known_then(describe(info)))
    target_service = target_pb2.DESCRIPTOR.services_by_name["TargetService"]
    draft_service = draft_pb2.DESCRIPTOR.services_by_name["DraftService"]
    target_config, draft_config = replace(TARGET, simulated_step_ms=5.0), replace(DRAFT)  # time to draft in
    async with contextlib.AsyncExitStack() as stack:
        target = Recipe("target", target_service, OldTarget, lambda: target_server.build(target_config))
        draft = Recipe("draft", draft_service, OldDraft, lambda: draft_server.build(draft_config))
        yield (
            await stack.enter_async_context(running_worker(target_config, target)),
            await stack.enter_async_context(running_worker(draft_config, draft)),
        )


@pytest.mark.parametrize("method", ["COUPLED", "REJECTION"])
async def test_workers_of_the_predecessor_serve_a_coordinator_with_the_same_tokens(
    cluster: Cluster, old_workers: tuple[RunningWorker, RunningWorker], redis_url: str, method: str
) -> None:
    """Drafting included. Tokens of rejection depend on the draft's length, which is thus fixed, and on timing."""
    number = sampling_pb2.VerificationMethod.Value(f"VERIFICATION_METHOD_{method}")
    request = {**REQUEST, "verification": number, "num_draft_tokens": 3}
    ports = old_workers[0].port, old_workers[1].port
    async with node(ports, redis_url) as beside:
        parts = [part async for part in beside.stub.Generate(pb.GenerateRequest(**request))]
    tokens = [token for part in parts for token in part.token_ids]
    assert len(tokens) == 60
    assert parts[-1].finished.statistics.num_accepted_tokens > 0
    if method == "COUPLED":
        assert tokens == (await cluster.generate(**request)).tokens
