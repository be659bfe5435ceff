"""`make check-mutants`: applies each mutant to a copy of the tree and shows which tests fail on it.

Owns: copying, applying, running, the table. Fails where a test passes on a mutant or fails without one, and where a
mutant does not apply. The working tree is left as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.mutants.mutants import MUTANTS, Edit, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("services", "tests", "protos", "pyproject.toml")
TESTS_FAILED = 1
"""pytest's exit status; anything above means that no test was judged."""


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
        outcomes = {TESTS_FAILED: "killed", 0: "SURVIVED"}
        return {test: outcomes.get(run_pytest(tree, (test,)), "not judged") for test in mutant.tests}
    finally:
        for path, text in before.items():
            (tree / path).write_text(text)


def main() -> int:
    console = Console()
    table = Table("mutant", "test", "outcome", title="Mutants")
    all_killed = True
    with tempfile.TemporaryDirectory(prefix="outrider-mutants-") as directory:
        tree = Path(directory)
        copy_tree(tree)
        tests = tuple(dict.fromkeys(test for mutant in MUTANTS for test in mutant.tests))
        if status := run_pytest(tree, tests):
            console.print(f"the tests fail without any mutant (pytest: {status})")
            return 1
        for mutant in MUTANTS:
            for test, outcome in judge(mutant, tree).items():
                all_killed &= outcome == "killed"
                console.print(f"{mutant.name}: {outcome} by {test}", soft_wrap=True, highlight=False, markup=False)
                table.add_row(mutant.name, test.split("::")[1].replace("[", r"\["), outcome)
    console.print(table)
    return 0 if all_killed else 1


if __name__ == "__main__":
    sys.exit(main())
