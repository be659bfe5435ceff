"""A worker over two ranks, as processes: its tokens are those of one process, and it ends as a whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import load_file, save_file

from services.common.items import Decode, Identity, Open, Refused, Tokens, Verify
from services.common.rpc import channel_options
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.target.config import TargetConfig
from services.target.server import running_target
from tests.tiny_models import save_model
from tests.worker_streams import Stream, target_stream

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator(check_available=False) is not None,
    reason="this build of torch shards models over its accelerator only",
)

END_S = 20.0
PROMPTS = ((7, 8, 9, 10), (30,) * 20, tuple(range(10, 70)))
HEALTH = health_pb2.HealthCheckResponse


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Ranks:
    """The processes of a worker."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.leader = process
        self.port = port
        self.followers = psutil.Process(process.pid).children()

    def are_gone(self) -> bool:
        """Waits for the followers to end."""
        return not psutil.wait_procs(self.followers, timeout=END_S)[1]


@contextmanager
def worker(model: Path) -> Iterator[Ranks]:
    command = [sys.executable, "-P", "-m", "services.target", "--model", str(model), "--tensor-parallel-size", "2"]
    command += ["--port", "0", "--threads", "2", "--num-blocks", "64", "--drain-s", "0.1", "--metrics-port", "-1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            ranks = Ranks(process, json.loads(process.stdout.readline())["port"])
            assert len(ranks.followers) == 1
            yield ranks
        finally:
            process.kill()
    assert ranks.are_gone()


async def generate(stream: Stream, prompt: tuple[int, ...], sampling: SamplingParams, epoch: int) -> tuple[int, ...]:
    """12 tokens decoded alone, then a round over the same prompt with a proposal that is right at first."""
    session = f"{prompt} at {sampling.temperature}"
    opening = Identity(session, epoch, 1, 0, len(prompt))
    method = VerificationMethod.COUPLED
    await stream.send(Open(opening, prompt, len(prompt), frozenset(), sampling, method, 100), Decode(opening, 12))
    tokens = await stream.tokens()
    again = Identity(session, epoch, 2, 0, len(prompt))
    at = Identity(session, epoch, 2, 1, len(prompt))
    await stream.send(
        Open(again, prompt, len(prompt), frozenset(), sampling, method, 100),
        Verify(at, Proposal(1, (*tokens[:3], tokens[3] ^ 1, 5))),
    )
    return tokens + await stream.tokens()


async def all_tokens(port: int, epoch: int = 1) -> list[tuple[int, ...]]:
    async with target_stream(port) as stream:
        return [
            await generate(stream, prompt, SamplingParams(temperature=temperature, seed=5), epoch)
            for prompt in PROMPTS
            for temperature in (0.0, 1.0)
        ]


async def test_two_ranks_give_the_tokens_of_one_process_and_end_on_sigterm(tmp_path: Path) -> None:
    model = save_model(tmp_path, num_heads=4, num_kv_heads=2)
    async with running_target(TargetConfig(port=0, model=str(model), threads=1, num_blocks=64)) as one:
        expected = await all_tokens(one.port)
    assert all(len(tokens) == 16 for tokens in expected)
    with worker(model) as ranks:
        assert await all_tokens(ranks.port) == expected
        ranks.leader.send_signal(signal.SIGTERM)
        assert ranks.leader.wait(END_S) == 0
        assert ranks.are_gone()


async def test_a_sequence_without_finite_logits_leaves_no_trace_on_any_rank(tmp_path: Path) -> None:
    """Its prompt has a token whose embedding is not a number."""
    bad, model = 301, save_model(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][bad] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with worker(model) as ranks:
        expected = await all_tokens(ranks.port)
        async with target_stream(ranks.port) as stream:
            prompt = (5, bad, *range(10, 50))
            opening, sampling = Identity("broken", 1, 1, 0, len(prompt)), SamplingParams()
            method = VerificationMethod.COUPLED
            await stream.send(Open(opening, prompt, 2, frozenset(), sampling, method, 100), Decode(opening, 1))
            refused = await stream.next()
            assert isinstance(refused, Refused)
            assert "not finite" in refused.error.message
        assert await all_tokens(ranks.port, epoch=2) == expected


async def test_a_killed_rank_takes_the_worker_down_amid_its_work(tmp_path: Path) -> None:
    with worker(save_model(tmp_path)) as ranks:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{ranks.port}", options=channel_options()) as channel,
            target_stream(ranks.port) as stream,
        ):
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service="outrider.v1.TargetService")
            )
            assert (await watch.read()).status == HEALTH.SERVING
            prompt = PROMPTS[0]
            opening = Identity("a", 1, 1, 0, len(prompt))
            sampling, method = SamplingParams(), VerificationMethod.COUPLED
            await stream.send(Open(opening, prompt, 4, frozenset(), sampling, method, 400), Decode(opening, 400))
            assert isinstance(await stream.next(), Tokens)
            ranks.followers[0].kill()
            assert (await watch.read()).status == HEALTH.NOT_SERVING
        assert ranks.leader.wait(END_S) == 1
