"""`make check-distribution`: every combination as a table; fails where any has p below the limit.

10^6 tokens of each through sampler and verifier, 10^4 sessions of each through the whole engine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from services.cli.bench.machine import environment
from tests.distribution import cases, chains, engine_cases
from tests.distribution.chains import NUM_TOKENS, Case
from tests.distribution.chi_square import LEAST_P, p_value
from tests.distribution.engine_cases import EngineCase


class Result(NamedTuple):
    """One combination's outcome."""

    case: Case | EngineCase
    num_draws: int
    p: float
    seconds: float


def run(case: Case | EngineCase, num_draws: int, num_sessions: int) -> Result:
    torch.set_num_threads(1)
    started = time.monotonic()
    if isinstance(case, EngineCase):
        num_draws = num_sessions * NUM_TOKENS
        p = p_value(engine_cases.draw(case, num_draws), engine_cases.exact(case))
    else:
        p = p_value(chains.draw(case, num_draws), chains.exact(case))
    return Result(case, num_draws, p, time.monotonic() - started)


def table_of(results: list[Result]) -> Table:
    table = Table(title=f"First {NUM_TOKENS} tokens against the exact joint distribution")
    for column in ("through", "drafter", "processing", "vocabulary", "verification", "tokens", "p", "s"):
        table.add_column(column, justify="right" if column in ("vocabulary", "tokens", "p", "s") else "left")
    for case, num_draws, p, seconds in results:
        through = "engine" if isinstance(case, EngineCase) else "verifier"
        shown = f"{p:.4f}" if p >= LEAST_P else f"[red]{p:.1e}[/red]"
        cells = (through, case.drafter, case.processing, str(case.vocab_size), case.method.value, f"{num_draws:,}")
        table.add_row(*cells, shown, f"{seconds:.0f}")
    return table


def write_json(path: Path, results: list[Result]) -> None:
    rows = [{"case": str(case), "num_draws": num_draws, "p": p} for case, num_draws, p, _ in results]
    measured = dataclasses.asdict(environment([])) | {"command": "python -m tests.distribution.check"}
    path.write_text(json.dumps({"environment": measured, "least_p": LEAST_P, "results": rows}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1_000_000, help="tokens of each combination through the verifier")
    parser.add_argument("--sessions", type=int, default=10_000, help="sessions of each through the whole engine")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="file to write the p-values to")
    options = parser.parse_args()
    console = Console()
    work: Callable[[Case | EngineCase], Result] = partial(run, num_draws=options.draws, num_sessions=options.sessions)
    everything = [*engine_cases.ALL, *cases.ALL]
    results: list[Result] = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for result in pool.imap(work, everything):
            results.append(result)
            console.print(f"{len(results)}/{len(everything)} {result.case}: p = {result.p:.4f}", highlight=False)
    console.print(table_of(results))
    if options.json:
        write_json(options.json, results)
    failed = [result for result in results if result.p < LEAST_P]
    console.print(f"{len(results) - len(failed)} of {len(results)} at p >= {LEAST_P:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
