"""`python -m deploy.tools.images`: builds the images with docker or buildah, whichever is there.

Owns: the names, stages and build arguments of the images, and what a build is given of this machine.
Must not know: what the Dockerfiles do.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from deploy.tools.containers import COMMIT_LABEL
from deploy.tools.pip_config import PipConfig, read_pip_config
from services.cli.bench.machine import commit

ROOT = Path(__file__).resolve().parents[2]
LOCAL_BASE = "docker.io/library/debian:bookworm-slim"
CUDA_BASE = (
    "docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04"
    "@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701"
)


class Image(NamedTuple):
    """One image of the project."""

    name: str
    dockerfile: str
    stage: str | None


IMAGES = (
    Image("coordinator", "docker/coordinator.Dockerfile", None),
    Image("draft", "docker/worker.Dockerfile", "draft"),
    Image("target", "docker/worker.Dockerfile", "target"),
)


class Build(NamedTuple):
    """What a build is asked for."""

    engine: str
    tag: str
    variant: str = "cpu"
    base_image: str | None = None
    """None: the Dockerfile's own, pinned by digest."""
    torch_index_url: str | None = None
    commit: str | None = None
    """That the images say they were built from."""


def find_engine() -> str:
    """`docker` where its daemon answers, else `buildah`. Raises SystemExit with a sentence where neither is there."""
    if shutil.which("docker"):
        answer = subprocess.run(["docker", "info"], capture_output=True, check=False)
        if answer.returncode == 0:
            return "docker"
    if shutil.which("buildah"):
        return "buildah"
    sys.exit("images: needs docker with a running daemon, or buildah (Debian: apt-get install buildah)")


def version() -> str:
    """The project's, which tags the images and is the chart's appVersion."""
    match = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if match is None:
        raise ValueError("pyproject.toml names no version")
    return match[1]


def image_ref(image: Image, build: Build) -> str:
    """The CUDA variant of a worker has a tag of its own; the coordinator has no variants."""
    suffix = "-cuda" if build.variant == "cuda" and image.stage else ""
    return f"outrider-{image.name}:{build.tag}{suffix}"


def build_command(image: Image, build: Build, pip: PipConfig, secrets: Path) -> list[str]:
    """The command line that builds `image`; `secrets` holds pip.conf."""
    command = ["docker", "build"] if build.engine == "docker" else ["buildah", "build", "--isolation", "chroot"]
    if build.engine == "buildah":
        command += ["--layers", "--format", "docker"]
        command += [part for path in pip.directories for part in ("--volume", f"{path}:{path}:ro")]
    command += ["--file", image.dockerfile, "--tag", image_ref(image, build)]
    command += ["--secret", f"id=pip,src={secrets / 'pip.conf'}"]
    if pip.certificates:
        command += ["--secret", f"id=ca,src={pip.certificates}"]
    if build.commit:
        command += ["--label", f"{COMMIT_LABEL}={build.commit}"]
    if image.stage:
        command += ["--target", image.stage, "--build-arg", f"VARIANT={build.variant}"]
        if build.torch_index_url:
            command += ["--build-arg", f"TORCH_INDEX_URL={build.torch_index_url}"]
    if base := _base_image(image, build):
        command += ["--build-arg", f"BASE_IMAGE={base}"]
    if build.engine == "buildah" and build.base_image == LOCAL_BASE:
        command.append("--pull-never")
    return [*command, "."]


def _base_image(image: Image, build: Build) -> str | None:
    if build.base_image or build.variant == "cpu" or not image.stage:
        return build.base_image
    return CUDA_BASE


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.tools.images", description="Build the container images.")
    parser.add_argument("names", nargs="*", choices=[[], *(image.name for image in IMAGES)], metavar="IMAGE")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu", help="of the workers' images")
    parser.add_argument("--tag", default=version())
    parser.add_argument("--base-image", help="instead of the pinned one")
    parser.add_argument(
        "--torch-index-url", help="where pip finds the build of torch, if not where it is configured to"
    )
    options = parser.parse_args(arguments)
    build = Build(find_engine(), options.tag, options.variant, options.base_image, options.torch_index_url, commit())
    pip = read_pip_config()
    with tempfile.TemporaryDirectory() as folder:
        secrets = Path(folder)
        (secrets / "pip.conf").write_text(pip.text)
        for image in IMAGES:
            if options.names and image.name not in options.names:
                continue
            command = build_command(image, build, pip, secrets)
            sys.stderr.write(f"+ {' '.join(command)}\n")
            subprocess.run(command, check=True, cwd=ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
