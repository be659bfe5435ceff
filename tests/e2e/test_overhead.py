"""The measurements of what the coordinator costs, at a small size: their documents and counts, never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.conftest import COMMAND, environment

ROOT = Path(__file__).parents[2]


def measured_by(command: tuple[str, ...], directory: Path) -> dict[str, Any]:
    """The document that it writes with --json, in whose directory it leaves nothing else."""
    file = directory / "measured.json"
    env = environment(TMPDIR=str(directory), PYTHONPATH=str(ROOT))
    arguments = (*command, "--json", str(file))
    done = subprocess.run(arguments, capture_output=True, text=True, env=env, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert list(directory.iterdir()) == [file]
    document: dict[str, Any] = json.loads(file.read_text())
    return document


def test_overhead_is_measured_at_1_and_64_sessions_without_failures(tmp_path: Path) -> None:
    num_tokens, num_repeats = 16, 3
    document = measured_by((*COMMAND, "bench", "--overhead", "--ignore-eos", "--max-tokens", str(num_tokens)), tmp_path)
    assert document["failed_requests"] == 0
    one, many = document["sessions"]
    for entry, num_sessions, num_requests in ((one, 1, 8), (many, 64, 128)):
        assert (entry["num_sessions"], entry["failed_requests"]) == (num_sessions, 0)
        # The first token of a request is the prefill's; a round gives one at least, and with 4 drafted 5 at most.
        num_generations = num_repeats * num_requests
        assert num_generations * (num_tokens - 1) / 5 <= entry["num_rounds"] <= num_generations * num_tokens
        assert 0 < entry["num_drafts"] <= entry["num_rounds"]
        assert entry["tokens_per_s"] > 0
        overhead = entry["coordinator_overhead_ms"]
        assert 0 < overhead["p50"] <= overhead["p99"]
    assert many["cpu_ms_per_round"] > 0  # that of one session may be less than a clock tick
    assert document["environment"]["num_cores"] >= 1


def test_plain_decoding_through_the_coordinator_is_compared_with_the_engine(tmp_path: Path) -> None:
    arguments = ("--step-ms", "2", "--num-tokens", "16", "--repeats", "2")
    document = measured_by((sys.executable, str(ROOT / "bench" / "plain_overhead.py"), *arguments), tmp_path)
    assert (document["step_ms"], document["num_tokens"]) == (2.0, 16)
    for way in ("direct", "through"):
        times = document[f"{way}_ms_per_token"]
        assert len(times) == 2
        assert min(times) > 0
    assert document["ratio"] > 0
