"""Runs the measurements that need processes of their own (bench.engine.child), each within a bound of time.

Owns: their starting, ending and failing. Must not know: what they measure. A child that fails or takes too long is
recorded with its reason, and never ends the benchmark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAST_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class ChildModel:
    """What all children are given."""

    directory: Path
    dtype: str

    def command(self, kind: str, *arguments: str) -> list[str]:
        own = [sys.executable, "-m", "bench.engine.child", kind, "--model", str(self.directory), "--dtype", self.dtype]
        return [*own, *arguments]


def measure(model: ChildModel, kind: str, arguments: Sequence[str], limit_s: float, passive: bool) -> dict[str, Any]:
    """What the child printed, or `failed` with the reason. `passive`: idle threads sleep, as the workers' do."""
    try:
        done = subprocess.run(
            model.command(kind, *arguments), capture_output=True, text=True, timeout=limit_s, env=_environment(passive)
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done within {limit_s:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][-LAST_CHARACTERS:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def share_cores(model: ChildModel, rows: dict[str, int], seconds: float) -> dict[str, dict[str, float]]:
    """Steps a second of each role, alone and beside the others; a process and a thread for each."""
    children = {role: _Steps(model, count) for role, count in rows.items()}
    try:
        alone = {role: child.rate(seconds) for role, child in children.items()}
        for child in children.values():
            child.begin(seconds)
        beside = {role: child.end() for role, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    return {
        role: {"rows": rows[role], "alone": alone[role], "beside": beside[role], "ratio": beside[role] / alone[role]}
        for role in rows
    }


class _Steps:
    """A child that computes steps for as long as it is told."""

    def __init__(self, model: ChildModel, rows: int) -> None:
        self._process = subprocess.Popen(
            model.command("steps", "--rows", str(rows)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(True),
        )
        while (line := self._line()) != "ready":
            if not line:
                raise RuntimeError("a process that computes steps did not start")

    def rate(self, seconds: float) -> float:
        self.begin(seconds)
        return self.end()

    def begin(self, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def end(self) -> float:
        return float(self._line())

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _environment(passive: bool) -> dict[str, str]:
    return {**os.environ, **({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"} if passive else {})}
