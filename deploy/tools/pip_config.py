"""The environment's pip configuration, as a file that an image's build mounts and forgets.

Owns: which settings of pip travel into a build, and which local directories and certificates they refer to.
Must not know: how an image is built. Nothing of it is ever written into the repository or an image.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

CA_IN_BUILD = "/run/build-ca.pem"
"""Where a Dockerfile mounts the secret `ca`."""

_LINE = re.compile(r"(?P<scope>global|install|:env:)\.(?P<name>[\w-]+)='(?P<value>.*)'")
_TRAVELS = {
    "index-url",
    "extra-index-url",
    "find-links",
    "trusted-host",
    "timeout",
    "default-timeout",
    "retries",
    "cert",
}


class PipConfig(NamedTuple):
    """What a build needs so that pip finds what it finds here."""

    text: str
    """Content of the build's pip.conf."""
    directories: tuple[Path, ...]
    """Local directories that it refers to, under the same paths."""
    certificates: Path | None
    """A bundle of certificates, mounted at CA_IN_BUILD."""


def read_pip_config() -> PipConfig:
    """What `pip config list` says here; the environment's variables win over files."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    return parse_pip_config(listed)


def parse_pip_config(listed: str) -> PipConfig:
    """`listed` is the output of `pip config list`."""
    values: dict[str, str] = {}
    for scope in ("global", "install", ":env:"):
        for line in listed.splitlines():
            match = _LINE.fullmatch(line.strip())
            if match and match["scope"] == scope and match["name"] in _TRAVELS:
                values[match["name"].removeprefix("default-")] = match["value"].replace("\\n", " ")
    certificates = values.get("cert")
    if certificates:
        values["cert"] = CA_IN_BUILD
    lines = ["[global]", *(f"{name} = {value}" for name, value in sorted(values.items()))]
    return PipConfig("\n".join(lines) + "\n", _directories(values), Path(certificates) if certificates else None)


def _directories(values: dict[str, str]) -> tuple[Path, ...]:
    """An index's pages link to files beside it, so its parent is needed."""
    found: dict[Path, None] = {}
    for name in ("index-url", "extra-index-url", "find-links"):
        for word in values.get(name, "").split():
            path = Path(unquote(urlsplit(word).path)) if word.startswith("file://") else Path(word)
            if path.is_absolute() and path.is_dir():
                found[path if name == "find-links" else path.parent] = None
    return tuple(found)
