"""Whole systems as processes: a simulated cluster to share, and the `outrider` command as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from services.cli.cluster import Cluster, ClusterSpec

QUICK = ClusterSpec(
    target="simulated",
    drafter="simulated",
    simulated_step_ms=1.0,
    simulated_token_ms=0.1,
    simulated_acceptance=0.7,
)
COMMAND = (sys.executable, "-P", "-m", "services.cli.main")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A simulated cluster with 1 ms a forward, on free ports, shared by a test process."""
    with Cluster(QUICK) as running:
        yield running


def environment(**more: str) -> dict[str, str]:
    """This environment without Outrider's settings, plus `more`."""
    return {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_")} | more


@pytest.fixture
def run(cluster: Cluster) -> Run:
    """Runs `outrider` with arguments against the shared cluster, and waits for its end."""

    def outrider(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        env = environment(OUTRIDER_ADDRESS=cluster.address)
        return subprocess.run(
            [*COMMAND, *arguments], input=stdin, capture_output=True, text=True, env=env, timeout=60, check=False
        )

    return outrider


class Up:
    """`outrider up` on free ports, in a process of its own; its first line is read when asked for."""

    def __init__(self, tmp_path: Path, arguments: Sequence[str] = ()) -> None:
        ports = [part for name in ("coordinator", "draft", "target") for part in (f"--{name}-port", "0")]
        command = [*COMMAND, "up", "--simulated", "--simulated-step-ms", "1", "--json", *ports, *arguments]
        env = environment(TMPDIR=str(tmp_path))
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def children(self) -> list[int]:
        """Process ids of the services and the session store."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    running = Up(tmp_path)
    with running.process:
        yield running
        running.process.kill()
