"""The Dockerfiles, the compose file, and what a build is given of this machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.tools import check_images
from deploy.tools.check_images import MAX_SIZE_MB, faults
from deploy.tools.fetch import ToolsUnavailable, program
from deploy.tools.images import CUDA_BASE, IMAGES, LOCAL_BASE, Build, build_command, version
from deploy.tools.pip_config import CA_IN_BUILD, parse_pip_config
from services.common.config import load, reject_unknown
from services.coordinator.config import CoordinatorConfig
from services.draft.config import DraftConfig
from services.target.config import TargetConfig
from tests.deploy.chart import ROOT

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COORDINATOR, DRAFT, TARGET = IMAGES


def test_hadolint_finds_nothing() -> None:
    try:
        hadolint = program("hadolint")
    except ToolsUnavailable as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [hadolint, "--config", ROOT / ".hadolint.yaml", *DOCKERFILES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_unprivileged_and_end_in_the_service(path: Path) -> None:
    text = path.read_text()
    assert "ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim@sha256:" in text
    assert all(
        line.split()[1] in ("${BASE_IMAGE}", "runtime") for line in text.splitlines() if line.startswith("FROM ")
    )
    assert "USER 10001:10001" in text
    assert "HEALTHCHECK" in text
    assert 'ENTRYPOINT ["outrider", "serve"' in text
    assert not any(word in text.lower() for word in ("password", "token=", "index-url ="))


def test_images_hold_what_the_charts_values_can_ask_for() -> None:
    """Discovery and traces at coordinators, traces, int8 and a GPU's utilisation at workers."""
    extras = {path.name: re.search(r"'\.\[(.+)\]'", path.read_text()) for path in DOCKERFILES}
    installed = {name: set(match[1].split(",")) for name, match in extras.items() if match}
    assert installed["coordinator.Dockerfile"] == {"kubernetes", "traces"}
    assert installed["worker.Dockerfile"] == {"engine", "cuda", "traces"}
    assert "--target /opt/int8 torchao" in DOCKERFILES[-1].read_text()


PIP = """\
:env:.cert='/etc/ssl/ca.pem'
:env:.default-timeout='180'
:env:.find-links='{links}'
global.extra-index-url='https://user:secret@index.example.com/simple file://{index}'
global.find-links='/elsewhere'
global.no-color='true'
"""


def test_pips_configuration_travels_with_what_it_refers_to(tmp_path: Path) -> None:
    links, index = tmp_path / "wheels", tmp_path / "index" / "simple"
    links.mkdir()
    index.mkdir(parents=True)
    config = parse_pip_config(PIP.format(links=links, index=index))
    assert config.text.splitlines() == [
        "[global]",
        f"cert = {CA_IN_BUILD}",
        f"extra-index-url = https://user:secret@index.example.com/simple file://{index}",
        f"find-links = {links}",  # the environment's wins
        "timeout = 180",
    ]
    assert config.certificates == Path("/etc/ssl/ca.pem")
    assert set(config.directories) == {links, index.parent}  # an index links to files beside it


def command(image: Any, **options: Any) -> list[str]:
    config = parse_pip_config("global.index-url='https://secret@index.example.com/simple'")
    return build_command(image, Build(**{"engine": "docker", "tag": "1.0", **options}), config, Path("/scratch"))


def test_pips_configuration_is_mounted_and_never_an_argument() -> None:
    for engine in ("docker", "buildah"):
        words = command(COORDINATOR, engine=engine)
        assert "id=pip,src=/scratch/pip.conf" in words
        assert "secret@index" not in " ".join(words)


def test_workers_have_a_cuda_variant_and_the_coordinator_has_none() -> None:
    words = command(TARGET, variant="cuda")
    assert f"BASE_IMAGE={CUDA_BASE}" in words
    assert "VARIANT=cuda" in words
    assert "outrider-target:1.0-cuda" in words
    assert words[words.index("--target") + 1] == "target"
    assert "outrider-coordinator:1.0" in command(COORDINATOR, variant="cuda")
    assert not any("cuda" in word for word in command(COORDINATOR, variant="cuda"))


def test_a_base_of_ones_own_is_not_looked_for_in_the_hub() -> None:
    assert "--pull-never" in command(DRAFT, engine="buildah", base_image=LOCAL_BASE)
    assert "--pull-never" not in command(DRAFT, engine="buildah")
    assert "--pull-never" not in command(DRAFT, base_image=LOCAL_BASE)  # docker has no such option


def test_an_image_says_which_commit_it_was_built_from() -> None:
    words = command(DRAFT, commit="c0ffee")
    label = words[words.index("--label") + 1]
    assert label == "org.opencontainers.image.revision=c0ffee"
    assert "--label" not in command(DRAFT)


# --- What a container of an image is seen to do -----------------------------------------------------------------------

SEEN = {
    "user": "10001:10001",
    "size_mb": 400,
    "root_is_read_only": True,
    "exit_status_after_sigterm": 0,
    "spans": 9,
    "metrics": 26,
}


def test_an_image_without_a_fault_passes() -> None:
    assert set(MAX_SIZE_MB) == {image.name for image in IMAGES}
    for image in IMAGES:
        assert list(faults(image.name, SEEN)) == []
        assert list(faults(image.name, {**SEEN, "size_mb": MAX_SIZE_MB[image.name]})) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"user": ""}, "target: runs as root; runAsNonRoot needs a number above 0"),
        ({"user": "0:0"}, "target: runs as 0:0; "),
        ({"user": "outrider"}, "target: runs as outrider; "),
        ({"root_is_read_only": False}, "target: its root file system can be written to"),
        ({"size_mb": MAX_SIZE_MB["target"] + 1}, "target: 1601 MB, more than the 1600 of MAX_SIZE_MB"),
        ({"exit_status_after_sigterm": 143}, "target: ended with status 143 after SIGTERM, not 0"),
        ({"exit_status_after_sigterm": None}, "target: did not end within 60 s of SIGTERM"),
        ({"spans": 0}, "target: 0 spans and 26 metrics of a generation"),
        ({"metrics": 0}, "target: 9 spans and 0 metrics of a generation"),
    ],
    ids=str,
)
def test_a_fault_of_an_image_is_a_sentence(change: dict[str, Any], sentence: str) -> None:
    (found,) = faults("target", {**SEEN, **change})
    assert found.startswith(sentence)


@pytest.mark.parametrize(("ends", "status"), [("exit 7", 7), (":", None)])
def test_a_container_that_does_not_end_is_no_clean_end(
    ends: str, status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_images, "_STOP_S", 5.0 if status else 0.2)
    script = f"trap '{ends}' TERM; echo ready; while :; do sleep 0.01; done"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert check_images._stop(process) == status
        assert process.poll() is not None


# --- Compose ----------------------------------------------------------------------------------------------------------

CONFIGS = {"coordinator": CoordinatorConfig, "draft": DraftConfig, "target": TargetConfig}


@pytest.fixture
def services() -> dict[str, Any]:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    return dict(yaml.safe_load(text)["services"])


def test_compose_starts_one_of_each_on_the_cpu_and_with_gpus(services: dict[str, Any]) -> None:
    by_profile = {
        profile: {name.removesuffix("-gpu") for name, s in services.items() if profile in s.get("profiles", [profile])}
        for profile in ("cpu", "gpu")
    }
    assert by_profile["cpu"] == by_profile["gpu"] == {"redis", "coordinator", "draft", "target", "model"}


def test_compose_gives_the_draft_one_gpu_and_the_target_two_others(services: dict[str, Any]) -> None:
    devices = {
        name: services[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name in ("draft-gpu", "target-gpu")
    }
    assert devices == {"draft-gpu": ["0"], "target-gpu": ["1", "2"]}
    assert services["target-gpu"]["environment"]["OUTRIDER_TENSOR_PARALLEL_SIZE"] == "2"
    assert services["draft-gpu"]["networks"]["default"]["aliases"] == ["draft"]
    assert services["target-gpu"]["networks"]["default"]["aliases"] == ["target"]


def test_compose_gives_services_settings_that_they_accept(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if (role := name.removesuffix("-gpu")) in CONFIGS:
            reject_unknown(CONFIGS[role], known=("CACHE_DIR", "ADDRESS"), environ=service["environment"])
            assert load(CONFIGS[role], environ=service["environment"])


def test_compose_runs_the_images_of_this_version_without_rights(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        if "redis" not in service["image"]:
            assert f"${{OUTRIDER_TAG:-{version()}}}" in service["image"]
    assert services["coordinator"]["ports"] == ["127.0.0.1:50051:50051"]
