"""A draft from nothing but its target: trained by the command, then served by a cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from services.cli.cluster import Cluster, ClusterSpec
from tests.e2e.conftest import COMMAND, environment
from tests.tiny_models import save_model

TRAINING = {
    "max-conversation-len": 96,
    "num-sequences": 16,
    "self-play-tokens": 8_000,
    "head-tokens": 200,
    "train-tokens": 40_000,
    "batch-tokens": 512,
    "learning-rate": 3e-3,
    "threads": 1,
}


def outrider(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=100, check=False)


def test_a_draft_is_trained_and_served_and_leaves_the_output_as_it_was(tmp_path: Path) -> None:
    target = save_model(tmp_path / "target", vocab_size=300, peakedness=5.0)
    out = tmp_path / "draft"
    options = [part for name, value in TRAINING.items() for part in (f"--{name}", str(value))]
    done = outrider("train-draft", "--target", str(target), "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    assert (out / "curve.png").stat().st_size > 1_000
    moved = tmp_path / "moved"
    shutil.move(target, moved)  # it is found by what it is served with, not by where it was

    with Cluster(ClusterSpec(target=str(moved), drafter="model", draft=str(out))) as cluster:
        ask = ("generate", "tell me", "--max-tokens", "60", "--json", "--address", cluster.address)
        plain = json.loads(outrider(*ask, "--num-draft-tokens", "0").stdout)
        speculative = json.loads(outrider(*ask, "--num-draft-tokens", "5").stdout)
    assert speculative["text"] == plain["text"]
    assert speculative["statistics"]["num_accepted_tokens"] > 0


def test_heads_are_trained_and_served_over_the_targets_features(tmp_path: Path) -> None:
    target = save_model(tmp_path / "target", vocab_size=300, peakedness=5.0)
    out = tmp_path / "heads"
    options = [part for name, value in TRAINING.items() for part in (f"--{name}", str(value))]
    done = outrider("train-draft", "--target", str(target), "--out", str(out), "--kind", "mtp", *options)
    assert done.returncode == 0, done.stderr

    with Cluster(ClusterSpec(target=str(target), drafter="mtp", draft=str(out))) as cluster:
        ask = ("generate", "tell me", "--max-tokens", "60", "--json", "--address", cluster.address)
        for sampling in ((), ("--temperature", "0.8", "--seed", "7")):
            plain = json.loads(outrider(*ask, *sampling, "--num-draft-tokens", "0").stdout)
            speculative = json.loads(outrider(*ask, *sampling, "--num-draft-tokens", "5").stdout)
            assert speculative["text"] == plain["text"]
            assert speculative["statistics"]["num_accepted_tokens"] > 0
