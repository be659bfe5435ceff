"""What a rank does when another one does not do its part."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.common.errors import Internal, WorkerFailed
from services.common.failure import Failure
from services.engine.model_runner import ModelRunner
from services.engine.models import load_model
from services.engine.paged_model import EngineOptions, PagedTargetModel, load_engine, spec_of
from services.engine.progress import Reporter
from services.engine.step import Work
from services.engine.tensor_parallel import ranks
from services.engine.tensor_parallel.leading_runner import LeadingRunner, obey
from services.engine.tensor_parallel.message import Ints, unpack
from services.engine.verifier import Verifier
from tests.tiny_models import save_model
from tests.unit.engine.tensor_parallel.test_message import work

CPU = torch.device("cpu")
QUIET = Reporter(quiet=True)
END_S = 20.0
STUCK_RANK = """
import sys, time
from services.engine.tensor_parallel.__main__ import Inbox
inbox = Inbox(sys.stdin.buffer)
assert inbox.next() == b"step"
print("computing", flush=True)
time.sleep(600)
"""


class Recorder:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.messages: list[Ints] = []

    def send(self, message: Ints) -> None:
        self.messages.append(message)


def tiny_runner(path: Path) -> ModelRunner:
    return ModelRunner(load_model(save_model(path), torch.float32, CPU, QUIET), 256, 4)


def test_a_rank_that_ends_before_it_has_joined_fails_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(ranks.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    options = EngineOptions(str(save_model(tmp_path / "model")), tmp_path, num_ranks=2)
    with pytest.raises(WorkerFailed, match=r"rank 1 (of 2 ended with status 3|takes no steps)"):
        load_engine(options, QUIET, Failure())


async def test_an_idle_rank_that_ends_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexec cat\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(ranks.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(ranks.group, "have_announced", lambda *_: True)
    monkeypatch.setattr(ranks.group, "join", lambda *_: None)
    failure = Failure()
    group = ranks.Ranks(spec_of(EngineOptions("tiny", tmp_path, num_ranks=3), tmp_path), failure)
    try:
        assert failure.error is None
        os.kill(group.pids[1], signal.SIGKILL)
        assert "rank 2 of 3 ended with status -9" in str(await asyncio.wait_for(failure.wait(), END_S))
    finally:
        group.close()
    with pytest.raises(ProcessLookupError):
        os.kill(group.pids[0], 0)


def test_a_rank_in_a_step_ends_when_its_leader_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK_RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as rank:
        assert rank.stdin is not None
        assert rank.stdout is not None
        rank.stdin.write(len(b"step").to_bytes(8, "little") + b"step")
        rank.stdin.flush()
        assert rank.stdout.readline() == b"computing\n"
        rank.stdin.close()
        try:
            assert rank.wait(END_S) == 1
        finally:
            rank.kill()


def test_a_rank_that_was_told_nothing_ends_by_itself() -> None:
    command = [sys.executable, "-m", "services.engine.tensor_parallel"]
    assert subprocess.run(command, input=b"", timeout=END_S, check=False).returncode == 0


def test_the_leader_computes_what_it_sends(tmp_path: Path) -> None:
    runner, followers = tiny_runner(tmp_path), Recorder()
    works = [work(9, 0, (4, 5), 3), work(12, 0, num_rows=1)]
    logits = LeadingRunner(runner, followers).forward(works)
    (message,) = followers.messages
    assert torch.equal(runner.forward(unpack(message)), logits)
    assert logits.shape == (4, 320)


def test_a_sequence_without_finite_logits_leaves_no_trace_on_any_rank(tmp_path: Path) -> None:
    class Follower:
        """Another rank with a model of its own, whole."""

        runner = tiny_runner(tmp_path)

        def send(self, message: Ints) -> None:
            obey(self.runner, message)

    loaded = load_engine(EngineOptions(str(tmp_path), tmp_path, num_blocks=32), QUIET)
    follower, bad = Follower(), work(9, 0, num_rows=1)
    engine = replace(loaded, runner=LeadingRunner(loaded.runner, follower), ranks=follower)
    for runner in (loaded.runner, follower.runner):
        with torch.inference_mode():
            runner.model.module.get_input_embeddings().weight[bad.sequence.tokens[2]] = torch.nan
    with pytest.raises(Internal, match="not finite"):
        PagedTargetModel(engine, Verifier()).step([bad])
    for runner in (loaded.runner, follower.runner):
        assert runner.pool.is_finite(range(runner.pool.num_blocks))


def test_no_step_is_sent_for_no_work(tmp_path: Path) -> None:
    followers = Recorder()
    assert len(LeadingRunner(tiny_runner(tmp_path), followers).forward([])) == 0
    assert followers.messages == []


def test_a_step_that_fails_on_the_leader_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = tiny_runner(tmp_path)

    def fail(works: list[Work]) -> torch.Tensor:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(runner, "forward", fail)
    with pytest.raises(WorkerFailed, match="cannot go on together: connection closed"):
        LeadingRunner(runner, Recorder()).forward([work(3, 0, num_rows=1)])
