"""`make check-deploy` tests everything or fails: it skips nothing for want of a program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT

PROGRAMS = ("promtool", "prometheus", "redis-server")


def make(target: str, folder: Path, programs: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Runs `make target` where of all programs these alone can be found."""
    for name in programs:
        (folder / name).symlink_to("/bin/true")
    (folder / "bash").symlink_to(str(shutil.which("bash")))
    command = [str(shutil.which("make")), "--no-print-directory", "-C", str(ROOT), target]
    environ = {"PATH": str(folder)}
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=20)


@pytest.mark.parametrize(
    ("target", "missing"),
    [*(("check-deploy", name) for name in PROGRAMS), ("check-metrics", "promtool"), ("check-metrics", "prometheus")],
)
def test_a_check_names_the_program_that_is_missing(tmp_path: Path, target: str, missing: str) -> None:
    done = make(target, tmp_path, tuple(name for name in PROGRAMS if name != missing))
    assert done.returncode != 0
    assert done.stderr.startswith(f"{missing} is missing: install Debian's packages prometheus")
    assert done.stdout == ""  # before anything else


def test_nothing_is_missing_where_all_programs_are_there(tmp_path: Path) -> None:
    done = make("debian-programs", tmp_path, PROGRAMS)
    assert (done.returncode, done.stderr) == (0, "")
