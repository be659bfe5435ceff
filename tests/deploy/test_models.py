"""How models get into pods: the scripts of the download job and of what waits for it, run here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.cases import CASES, COMMIT, GPU, LARGE
from tests.deploy.chart import Manifest, containers, pods, render

pytestmark = pytest.mark.usefixtures("needs_helm")

HF = """#!/bin/sh
echo "$@" >> "$CALLS"
test "$2" != "$FAILING" || exit 1
mkdir -p "$6" && touch "$6/config.json"
"""
"""Stands for the hub's client: writes down how it was called, and makes what it was told to."""


class Pod:
    """Runs containers of the chart with /models below `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.models, self.calls = folder / "models", folder / "calls"
        (folder / "bin").mkdir()
        for name, text in (("hf", HF), ("python", '#!/bin/sh\ntest -f "$3/config.json"\n')):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def run(self, container: Manifest, failing: str = "", timeout_s: float = 20) -> int:
        words = [*container["command"], *container["args"]]
        words = [word.replace("/models", str(self.models)) for word in words]
        path = f"{self._folder / 'bin'}:{os.environ['PATH']}"
        environ = {"PATH": path, "CALLS": str(self.calls), "FAILING": failing}
        environ |= {v["name"]: v["value"] for v in container.get("env", []) if "value" in v}
        return subprocess.run(words, env=environ, check=False, timeout=timeout_s).returncode

    def downloads(self) -> list[str]:
        return [line.split()[1] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def named(manifests: list[Manifest], owner: str, name: str) -> Manifest:
    (found,) = (
        container
        for workload, template in pods(manifests)
        if workload.startswith(f"test-outrider-{owner}")
        for container in containers(template)
        if container["name"] == name
    )
    return found


def test_pods_wait_for_what_the_job_makes(pod: Pod) -> None:
    manifests = render(GPU)
    assert pod.run(named(manifests, "models", "download")) == 0
    for owner in ("target", "draft", "coordinator"):
        assert pod.run(named(manifests, owner, "wait-for-models")) == 0


def test_pods_wait_as_long_as_a_model_is_not_whole(pod: Pod) -> None:
    manifests = render(GPU)
    assert pod.run(named(manifests, "models", "download"), failing="acme/small") != 0
    assert pod.run(named(manifests, "target", "wait-for-models")) == 0
    with pytest.raises(subprocess.TimeoutExpired):
        pod.run(named(manifests, "draft", "wait-for-models"), timeout_s=0.5)


def test_what_is_there_is_not_downloaded_again(pod: Pod) -> None:
    job = named(render(GPU), "models", "download")
    assert pod.run(job, failing="acme/small") != 0
    assert pod.run(job) == 0
    assert pod.run(job) == 0
    assert pod.downloads() == ["acme/large", "acme/small", "acme/small"]


def test_the_pinned_commit_is_downloaded_without_pickles(pod: Pod) -> None:
    assert pod.run(named(render(GPU), "models", "download")) == 0
    call = pod.calls.read_text().splitlines()[0]
    assert call.startswith(f"download acme/large --revision {COMMIT} --local-dir {pod.models}/acme--large/{COMMIT} ")
    assert "--exclude *.bin" in call
    assert "*.safetensors" not in call


def test_a_coordinator_downloads_no_weights(pod: Pod) -> None:
    manifests = render(CASES["models in each pod"])
    assert pod.run(named(manifests, "coordinator", "download")) == 0
    assert "--exclude *.safetensors" in pod.calls.read_text()
    assert pod.downloads() == ["acme/large"]


@pytest.mark.parametrize(
    ("case", "without_weights"),
    [
        ("draft of another vocabulary in each pod", {"acme/large"}),
        ("trained draft in each pod", set()),  # it reads the target's embedding as well as its tokenizer
        ("staged by a model in each pod", set()),
    ],
)
def test_a_draft_downloads_weights_of_what_it_computes_with(pod: Pod, case: str, without_weights: set[str]) -> None:
    assert pod.run(named(render(CASES[case]), "draft", "download")) == 0
    calls = pod.calls.read_text().splitlines()
    assert {line.split()[1] for line in calls if "*.safetensors" in line} == without_weights
    assert len(calls) == 2


def test_the_job_for_all_pods_downloads_weights_of_a_tokenizer_too(pod: Pod) -> None:
    """A later upgrade may serve that model, and what is whole is not downloaded again."""
    assert pod.run(named(render(CASES["draft of another vocabulary"]), "models", "download")) == 0
    assert "*.safetensors" not in pod.calls.read_text()
    assert (pod.models / LARGE.removeprefix("/models/") / ".complete").exists()
