"""What real services log: JSON with the work's ids, and never what was asked, answered or used as a key."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.request import urlopen

import grpc.aio
import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common import rpc_errors
from services.common.errors import Unavailable
from services.common.logs import TEXT_FORMAT, JsonFormatter
from services.common.otel import OtelTracer, new_provider
from services.coordinator import server as coordinator_server
from services.coordinator.config import CoordinatorConfig
from services.coordinator.server import running_coordinator
from services.engine.simulated import SimulatedTarget
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster, start_cluster

__all__ = ["start_cluster"]

SECRETS = ("CanaryPrompt", "CanaryStop", "CanaryKey", "CanaryDraft", "CanaryRedis")
FIELDS = {
    "prompt": "CanaryPrompt",
    "stop": ["CanaryStop"],
    "max_tokens": 20,
    "ignore_eos": True,
    "sampling": sampling_pb2.SamplingParams(temperature=0),
}
KEY = (("authorization", "Bearer CanaryKey"), ("x-api-key", "CanaryKey"))
SLOW = replace(TARGET, simulated_step_ms=3.0)


class Logs:
    """Everything that is logged, by whomever and at whatever level, in both formats."""

    def __init__(self) -> None:
        self._handlers = [logging.StreamHandler(io.StringIO()) for _ in range(2)]
        self._handlers[0].setFormatter(JsonFormatter())
        self._handlers[1].setFormatter(logging.Formatter(TEXT_FORMAT))

    def __enter__(self) -> Logs:
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(logging.DEBUG)
        for handler in self._handlers:
            root.addHandler(handler)
        return self

    def __exit__(self, *exc: object) -> None:
        root = logging.getLogger()
        root.setLevel(self._level)
        for handler in self._handlers:
            root.removeHandler(handler)

    @property
    def text(self) -> str:
        return "".join(handler.stream.getvalue() for handler in self._handlers)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._handlers[0].stream.getvalue().splitlines()]

    def of(self, session_id: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("session_id") == session_id]


@pytest.fixture
def logs() -> Iterator[Logs]:
    with Logs() as logs:
        yield logs


def leaked(text: str, prompt: str = "CanaryPrompt") -> list[str]:
    """Secrets in `text`, written out or as the token ids that the simulated tokenizer makes of them."""
    ids = ", ".join(str(byte) for byte in prompt.encode())
    return [secret for secret in (*SECRETS, ids) if secret in text]


async def end_of(cluster: Cluster, request: pb.GenerateRequest) -> str:
    """How the call ended: the reason, empty where it ended well."""
    try:
        async for _ in cluster.stub.Generate(request, metadata=KEY):
            pass
    except grpc.aio.AioRpcError as error:
        return rpc_errors.error_from_rpc(error).reason
    return ""


async def test_neither_prompts_nor_text_nor_keys_are_logged_however_a_call_ends(
    start_cluster: StartCluster, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_cluster(target=SLOW) as cluster:
        chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="CanaryPrompt")])
        ends = [
            await end_of(cluster, pb.GenerateRequest(**FIELDS)),
            await end_of(cluster, pb.GenerateRequest(**FIELDS | {"max_tokens": 1 << 30})),
            await end_of(cluster, pb.GenerateRequest(**FIELDS | {"prompt": "CanaryPrompt" * 100_000})),
            await end_of(cluster, pb.GenerateRequest(**FIELDS | {"draft": "CanaryDraft"})),
            await end_of(cluster, pb.GenerateRequest(chat=chat, max_tokens=5)),
            await end_of(cluster, pb.GenerateRequest(**FIELDS | {"session_id": "CanaryPrompt"})),
        ]
        monkeypatch.setattr(SimulatedTarget, "step", _fails)
        ends.append(await end_of(cluster, pb.GenerateRequest(**FIELDS)))
    assert ends[0] == ""
    assert ends[1:4] == ["INVALID_PARAMETER", "PROMPT_TOO_LONG", "INVALID_PARAMETER"]
    assert ends[-1] == "DEFECT"
    assert "its core failed" in logs.text
    assert len(logs.records) > 5
    assert leaked(logs.text) == []


def _fails(self: SimulatedTarget, works: object) -> object:
    raise RuntimeError("the device is on fire")


def test_a_leak_would_be_noticed(logs: Logs) -> None:
    logging.getLogger("services").debug("%r", pb.GenerateRequest(prompt="CanaryPrompt"))
    logging.getLogger("services").debug("%r", tuple(b"CanaryPrompt"))
    assert leaked(logs.text) == ["CanaryPrompt", ", ".join(map(str, b"CanaryPrompt"))]


async def test_records_carry_session_round_and_trace(start_cluster: StartCluster, logs: Logs) -> None:
    provider = new_provider(1.0, "coordinator")
    async with start_cluster(target=SLOW, tracers={"coordinator": OtelTracer(provider)}) as cluster:
        result = await cluster.generate(**FIELDS, num_draft_tokens=4)
    provider.shutdown()
    [ended] = [r for r in logs.of(result.started.session_id) if "ended behind" in r["message"]]
    assert ended["message"] == f"session {result.started.session_id} ended behind 20 tokens: length"
    assert ended["round"] >= 1
    assert len(ended["trace_id"]) == 32
    assert (ended["level"], ended["logger"]) == ("info", "services.coordinator.generation")
    assert ended["time"].endswith("+00:00")


async def test_a_workers_refusal_is_logged_with_its_session_and_round(start_cluster: StartCluster, logs: Logs) -> None:
    async with start_cluster(target=replace(SLOW, max_sequences=1), draft=None) as cluster:
        call = cluster.stub.Generate(pb.GenerateRequest(**FIELDS | {"max_tokens": 5_000}))
        await call.read()
        while not (await call.read()).token_ids:
            pass
        session_id = "11111111-1111-4111-8111-111111111111"
        assert await end_of(cluster, pb.GenerateRequest(**FIELDS, session_id=session_id)) != ""
        call.cancel()
    refused = [r for r in logs.of(session_id) if r["logger"] == "services.common.worker"]
    assert refused
    assert {record["round"] for record in refused} == {0}


async def test_the_stores_password_is_in_no_error(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_server, "_STORE_START_S", 0.1)
    config = CoordinatorConfig(port=0, redis_url="redis://user:CanaryRedis@127.0.0.1:1/0", tokenizer="simulated")
    with pytest.raises(Unavailable) as caught:
        async with running_coordinator(config):
            pass
    assert leaked(str(caught.value) + logs.text) == []


def test_a_service_logs_json_and_names_its_metrics_port_in_the_ready_line() -> None:
    flags = ["--model", "simulated", "--port", "0", "--metrics-port", "0", "--log-format", "json", "--drain-s", "0"]
    command = [sys.executable, "-P", "-m", "services.target", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = json.loads(process.stdout.readline())
            with urlopen(f"http://127.0.0.1:{ready['metrics_port']}/metrics", timeout=5) as response:
                scraped = response.read().decode()
        finally:
            process.terminate()
            _, logged = process.communicate(timeout=20)
    assert "outrider_worker_ready" in scraped
    [serving] = [record for line in logged.splitlines() if "serves on" in (record := json.loads(line))["message"]]
    assert serving["level"] == "info"
    assert process.returncode == 0


def test_an_exception_is_part_of_its_record() -> None:
    try:
        raise ValueError("line\nbreak")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    [line] = JsonFormatter().format(record).splitlines()
    assert "ValueError: line\nbreak" in json.loads(line)["exception"]
