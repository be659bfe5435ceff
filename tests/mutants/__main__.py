"""`make check-mutants`: applies each mutant to a copy of the tree and shows which tests fail on it.

    python -m tests.mutants --only "the bonus token unprocessed"

Owns: copying, applying, running, the table, the outcomes' document. Fails where a test passes on a mutant or fails
without one, and where a mutant does not apply. The working tree is left as it is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from services.cli.bench.machine import environment
from tests.mutants.mutants import MUTANTS, Edit, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("services", "tests", "protos", "pyproject.toml")
TESTS_FAILED = 1
"""pytest's exit status; anything above means that no test was judged."""
KILLED = "killed"


def copy_tree(to: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignore)
        else:
            shutil.copy(source, to / name)


def apply(edit: Edit, tree: Path) -> bool:
    """Whether `before` stood there exactly once, and was replaced."""
    path = tree / edit.path
    text = path.read_text()
    if text.count(edit.before) != 1:
        return False
    path.write_text(text.replace(edit.before, edit.after))
    return True


def run_pytest(tree: Path, tests: tuple[str, ...]) -> int:
    """pytest's exit status on the tree's own sources."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environ = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environ, capture_output=True, check=False).returncode


def judge(mutant: Mutant, tree: Path) -> dict[str, str]:
    """What became of the mutant under each of its tests. The tree is restored."""
    before = {edit.path: (tree / edit.path).read_text() for edit in mutant.edits}
    try:
        if not all(apply(edit, tree) for edit in mutant.edits):
            return dict.fromkeys(mutant.tests, "does not apply")
        outcomes = {TESTS_FAILED: KILLED, 0: "SURVIVED"}
        return {test: outcomes.get(run_pytest(tree, (test,)), "not judged") for test in mutant.tests}
    finally:
        for path, text in before.items():
            (tree / path).write_text(text)


def judge_all(mutants: Sequence[Mutant], on_outcome: Callable[[Mutant, str, str], None]) -> list[dict[str, Any]]:
    """Of each mutant what became of it under each of its tests. Raises where they fail without any mutant."""
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="outrider-mutants-") as directory:
        tree = Path(directory)
        copy_tree(tree)
        tests = tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        if status := run_pytest(tree, tests):
            raise click.ClickException(f"the tests fail without any mutant (pytest: {status})")
        for mutant in mutants:
            outcomes = judge(mutant, tree)
            for test, outcome in outcomes.items():
                on_outcome(mutant, test, outcome)
            killed = all(outcome == KILLED for outcome in outcomes.values())
            verdicts.append({"mutant": mutant.name, "tests": outcomes, "killed": killed})
    return verdicts


def chosen(names: Sequence[str]) -> tuple[Mutant, ...]:
    """Those of these names; all where none is named."""
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint="--only")
    return tuple(known[name] for name in names or known)


@click.command()
@click.option("--only", "names", multiple=True, metavar="MUTANT", help="Only this one; for several, repeat it.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the outcomes there.")
def main(names: tuple[str, ...], json_file: Path | None) -> None:
    """Show that each mutant is killed by every test meant for it; status 1 if one survives a test."""
    console = Console()
    table = Table("mutant", "test", "outcome", title="Mutants")

    def show(mutant: Mutant, test: str, outcome: str) -> None:
        console.print(f"{mutant.name}: {outcome} by {test}", soft_wrap=True, highlight=False, markup=False)
        table.add_row(mutant.name, test.split("::")[1].replace("[", r"\["), outcome)

    verdicts = judge_all(chosen(names), show)
    console.print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "-m", "tests.mutants", *sys.argv[1:]])
        taken = dataclasses.asdict(environment([])) | {"command": command}
        json_file.write_text(json.dumps({"mutants": verdicts, "environment": taken}, indent=2) + "\n")
    sys.exit(not all(verdict["killed"] for verdict in verdicts))


if __name__ == "__main__":
    main()
