"""`make check-chaos-mutants`: the chaos test on copies of the services with a defect each, which it has to notice.

Owns: which defects, and what of the findings has to tell of each; a run that fails for another reason does not count.
Must not know: how the chaos test is made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from services.cli.bench.machine import environment
from tests.chaos.faults import DECK
from tests.mutants.__main__ import apply, copy_tree
from tests.mutants.mutants import MUTANTS

TELLS = {"emit before persist": "num_early", "compare-and-set without the epoch": "num_stale_writes"}
"""What is counted where the defect shows."""
_FAILED = 1


def run_mutated(name: str, arguments: Sequence[str], logs: Path | None = None) -> int:
    """`python -m tests.chaos` on a copy of the tree with that mutant; its exit status. `logs`: where they stay."""
    with tempfile.TemporaryDirectory(prefix="outrider-mutant-") as directory:
        tree = Path(directory)
        copy_tree(tree)
        mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
        if not all(apply(edit, tree) for edit in mutant.edits):
            raise click.ClickException(f"the mutant {name!r} does not apply")
        command = [sys.executable, "-m", "tests.chaos", *arguments]
        environ = {**os.environ, "PYTHONPATH": str(tree), **({"TMPDIR": str(logs)} if logs else {})}
        return subprocess.run(command, cwd=tree, env=environ, check=False).returncode


def check(name: str, num_faults: int, seed: int) -> dict[str, Any]:
    """What the run with that mutant found, and whether that tells of it."""
    with tempfile.TemporaryDirectory(prefix="outrider-chaos-") as directory:
        file = Path(directory) / "chaos.json"
        arguments = ["--faults", str(num_faults), "--seed", str(seed), "--json", str(file)]
        status = run_mutated(name, arguments, Path(directory))
        return verdict(name, status, json.loads(file.read_text()) if file.exists() else {})


def verdict(name: str, status: int, found: dict[str, Any]) -> dict[str, Any]:
    """`found`: the document of a run that ended with `status`; empty where it did not come to an end."""
    failures = {key: found[key] for key in found.get("failed", ())}
    return {
        "mutant": name,
        "noticed": status == _FAILED and TELLS[name] in failures,
        "by": TELLS[name],
        "status": status,
        "failures": failures,
        **{key: found.get(key) for key in ("num_faults", "num_requests", "seed", "seconds")},
    }


@click.command()
@click.option("--faults", "num_faults", default=DECK, show_default=True, help="How many, for each mutant.")
@click.option("--seed", default=1, show_default=True, help="Of requests and faults.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the verdicts there.")
def main(num_faults: int, seed: int, json_file: Path | None) -> None:
    """Show that the chaos test notices defects that lose or double tokens; status 1 if one escapes it."""
    verdicts = [check(name, num_faults, seed) for name in TELLS]
    table = Table("mutant", "noticed", "by", "what failed", title="Mutants under chaos")
    for found in verdicts:
        failures = ", ".join(f"{key} {number}" for key, number in found["failures"].items())
        table.add_row(found["mutant"], "yes" if found["noticed"] else "[bold red]NO", found["by"], failures)
    Console().print(table)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "-m", "tests.chaos.mutants", *sys.argv[1:]])
        taken = dataclasses.asdict(environment([])) | {"command": command}
        json_file.write_text(json.dumps({"mutants": verdicts, "environment": taken}, indent=2) + "\n")
    sys.exit(not all(found["noticed"] for found in verdicts))


if __name__ == "__main__":
    main()
