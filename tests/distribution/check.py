"""`make check-distribution`: every combination, 10^6 tokens each, as a table; fails where any has p below the limit."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests.distribution.cases import ALL
from tests.distribution.chains import NUM_TOKENS, Case, draw, exact
from tests.distribution.chi_square import LEAST_P, p_value


class Result(NamedTuple):
    """One combination's outcome."""

    case: Case
    p: float
    seconds: float


def run(case: Case, num_draws: int) -> Result:
    started = time.monotonic()
    return Result(case, p_value(draw(case, num_draws), exact(case)), time.monotonic() - started)


def table_of(results: list[Result], num_draws: int) -> Table:
    table = Table(title=f"First {NUM_TOKENS} tokens against the exact joint distribution, {num_draws:,} tokens each")
    for column in ("drafter", "processing", "vocabulary", "verification", "p", "s"):
        table.add_column(column, justify="right" if column in ("vocabulary", "p", "s") else "left")
    for case, p, seconds in results:
        shown = f"{p:.4f}" if p >= LEAST_P else f"[red]{p:.1e}[/red]"
        table.add_row(case.drafter, case.processing, str(case.vocab_size), case.method.value, shown, f"{seconds:.0f}")
    return table


def write_json(path: Path, results: list[Result], num_draws: int) -> None:
    rows = [{"case": str(case), "p": p} for case, p, _ in results]
    path.write_text(json.dumps({"num_draws": num_draws, "least_p": LEAST_P, "results": rows}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1_000_000, help="tokens of each combination")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="file to write the p-values to")
    options = parser.parse_args()
    console = Console()
    work: Callable[[Case], Result] = partial(run, num_draws=options.draws)
    results: list[Result] = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for result in pool.imap(work, ALL):
            results.append(result)
            console.print(f"{len(results)}/{len(ALL)} {result.case}: p = {result.p:.4f}", highlight=False)
    console.print(table_of(results, options.draws))
    if options.json:
        write_json(options.json, results, options.draws)
    failed = [result for result in results if result.p < LEAST_P]
    console.print(f"{len(results) - len(failed)} of {len(results)} at p >= {LEAST_P:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
