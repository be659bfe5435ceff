"""Which commit a measurement says it was taken on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from services.cli.bench.machine import commit

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a checkout with one commit."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "services").mkdir()
    for name in ("bench/results/a.json", "services/code.py"):
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    return tmp_path / "services" / "code.py"


def test_the_commit_of_the_checkout(file: Path) -> None:
    head = git(file.parent, "rev-parse", "HEAD")
    assert commit(file) == head
    (file.parent.parent / "bench" / "results" / "a.json").write_text("2")  # measured again, on the same code
    (file.parent / "untracked").touch()
    assert commit(file) == head


def test_changes_are_told(file: Path) -> None:
    file.write_text("2")
    assert commit(file) == f"{git(file.parent, 'rev-parse', 'HEAD')} and changes"


def test_an_installation_inside_of_another_checkout_names_no_commit(file: Path) -> None:
    installed = file.parent / "site-packages.py"
    installed.touch()
    assert commit(installed) is None


def test_no_checkout_names_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "code.py").touch()
    assert commit(tmp_path / "code.py") is None


def test_without_git_there_is_no_commit(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(file.parent))
    assert commit(file) is None
