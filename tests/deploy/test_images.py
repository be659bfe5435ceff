"""The Dockerfiles, the compose file, and what a build is given of this machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

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
