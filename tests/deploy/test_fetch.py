"""Pinned tools: only the pinned file is taken, and only once."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from deploy.tools.fetch import Package, ToolsUnavailable, fetch


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory where pip finds the wheel of `sample-tool` 1.0, and nothing else anywhere; returns its hash."""
    wheel = tmp_path / "sample_tool-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sample_tool/program", "#!/bin/sh\n")
        archive.writestr(
            "sample_tool-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample-tool\nVersion: 1.0\n"
        )
        archive.writestr("sample_tool-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("sample_tool-1.0.dist-info/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OUTRIDER_CACHE_DIR", str(tmp_path / "cache"))
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def unpack(wheel: zipfile.ZipFile, folder: Path) -> None:
    (folder / "program").write_bytes(wheel.read("sample_tool/program"))


def test_a_package_is_fetched_once(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("sample-tool==1.0", index, unpack)
    place = fetch(package)
    assert (place / "program").read_text() == "#!/bin/sh\n"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch(package) == place


def test_another_file_than_the_pinned_one_is_refused(index: str, tmp_path: Path) -> None:
    with pytest.raises(ToolsUnavailable, match=r"sample-tool==1\.0 can't be fetched"):
        fetch(Package("sample-tool==1.0", "0" * 64, unpack))
    assert not list((tmp_path / "cache" / "deploy-tools").iterdir())


def test_what_cannot_be_fetched_says_so(index: str) -> None:
    with pytest.raises(ToolsUnavailable, match=r"other-tool==1\.0 can't be fetched: .*No matching distribution"):
        fetch(Package("other-tool==1.0", index, unpack))
