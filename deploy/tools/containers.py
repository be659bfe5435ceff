"""Runs containers of the images as a cluster would: unprivileged, on a root file system that can't be written to.

Owns: how docker and buildah do that. Must not know: what is in the images; command, user and health check are theirs.
They share this machine's network, so that a check can reach them on the loopback address.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple, Protocol

COMMIT_LABEL = "org.opencontainers.image.revision"
"""The OCI image specification's, "Pre-Defined Annotation Keys"."""

# Binds the root onto itself to make it read-only, and becomes the container's process without a shell in between.
_ENTER = """
root=$1 user=$2; shift 2
mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
mount -t tmpfs tmpfs "$root/tmp" && mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev"
exec chroot --userspec="$user" "$root" env -i "$@"
"""


class ImageConfig(NamedTuple):
    """What an image says of itself."""

    size_bytes: int
    user: str
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    health_check: tuple[str, ...]
    commit: str | None
    """That it was built from; None where it does not say."""


class Container(Protocol):
    """A container; ends on exit."""

    @property
    def config(self) -> ImageConfig: ...

    def start(self, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Runs the image's entry point; what it prints goes to the process' standard output."""
        ...

    def run(self, env: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command beside it, as the same user."""
        ...


class BuildahContainer(AbstractContextManager["BuildahContainer"]):
    """On the image's files, entered by chroot in a mount namespace of its own. Needs root."""

    def __init__(self, image: str) -> None:
        self._image = f"localhost/{image}"
        self.config = _buildah_config(self._image)

    def __enter__(self) -> BuildahContainer:
        self._name = _output("buildah", "from", "--pull-never", self._image)
        self._root = _output("buildah", "mount", self._name)
        return self

    def __exit__(self, *exc: object) -> None:
        subprocess.run(["buildah", "rm", self._name], check=True, capture_output=True)

    def start(self, env: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command(env, *self.config.entrypoint), stdout=subprocess.PIPE, text=True)

    def run(self, env: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._command(env, *command), capture_output=True, text=True, check=False)

    def _command(self, env: Mapping[str, str], *command: str) -> list[str]:
        variables = [*self.config.env, *(f"{name}={value}" for name, value in env.items())]
        enter = ["unshare", "--mount", "sh", "-ec", _ENTER, "enter", self._root, self.config.user]
        return [*enter, *variables, *command]


class DockerContainer(AbstractContextManager["DockerContainer"]):
    """By the Docker engine."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._name = f"check-{image.partition(':')[0]}"
        (inspected,) = json.loads(_output("docker", "image", "inspect", image))
        self.config = _config(inspected["Size"], inspected["Config"])

    def __enter__(self) -> DockerContainer:
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(subprocess.CalledProcessError):
            _output("docker", "rm", "--force", self._name)

    def start(self, env: Mapping[str, str]) -> subprocess.Popen[str]:
        confined = ["--network=host", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", f"--name={self._name}"]
        command = ["docker", "run", "--rm", *confined, *_flags(env), self._image]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def run(self, env: Mapping[str, str], *command: str) -> subprocess.CompletedProcess[str]:
        words = ["docker", "exec", *_flags(env), self._name, *command]
        return subprocess.run(words, capture_output=True, text=True, check=False)


def _flags(env: Mapping[str, str]) -> list[str]:
    return [f"--env={name}={value}" for name, value in env.items()]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _buildah_config(image: str) -> ImageConfig:
    inspected = json.loads(_output("buildah", "inspect", "--type", "image", image))
    sizes = {
        name: entry["size"]
        for entry in json.loads(_output("buildah", "images", "--json"))
        for name in entry["names"] or ()
    }
    return _config(_bytes(sizes[image]), inspected["Docker"]["config"])


def _bytes(text: str) -> int:
    """Of what buildah prints, such as 1.46 GB."""
    number, unit = text.split()
    return round(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()])


def _config(size_bytes: int, config: Mapping[str, object]) -> ImageConfig:
    def words(name: str) -> tuple[str, ...]:
        value = config.get(name) or ()
        return tuple(str(word) for word in value) if isinstance(value, (list, tuple)) else ()

    health = config.get("Healthcheck") or {}
    test = health.get("Test", ()) if isinstance(health, dict) else ()
    labels = config.get("Labels") or {}
    commit = labels.get(COMMIT_LABEL) if isinstance(labels, dict) else None
    user = str(config.get("User") or "")
    return ImageConfig(size_bytes, user, words("Env"), words("Entrypoint"), tuple(test[1:]), commit)
