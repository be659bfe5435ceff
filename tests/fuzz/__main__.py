"""`python -m tests.fuzz --seconds 180`: fuzzes all methods in turns, counts inputs and outcomes; status 1 at a defect.

At a defect the input is printed, and the seed of its batch: `--seed` starts with that one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import click
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from services.cli.bench.machine import environment
from tests.fuzz.messages import encoded
from tests.fuzz.surfaces import Broken, Cluster, running_cluster

_BATCH = 200
_AT_ONCE = 10
_MAX_GROWTH_MB = 512


async def fuzz(
    cluster: Cluster, seconds: float, first_seed: int, on_time: Callable[[float], None]
) -> dict[str, Counter[str]]:
    """Counts of outcomes by method. Raises Broken, with the inputs sent last, at the first defect."""
    counts: dict[str, Counter[str]] = {}
    started, number = time.monotonic(), first_seed
    while (passed := time.monotonic() - started) < seconds:
        on_time(passed)
        surface = cluster.surfaces[number % len(cluster.surfaces)]
        outcomes = counts.setdefault(surface.name, Counter())
        rng = Random(number)
        inputs: list[list[bytes]] = []
        try:
            for _ in range(_BATCH // _AT_ONCE):
                most = 4 if surface.method.client_streaming else 1
                inputs = [
                    [encoded(rng, surface.method.name) for _ in range(rng.randint(1, most))] for _ in range(_AT_ONCE)
                ]
                outcomes.update(await asyncio.gather(*map(surface.send, inputs)))
            await cluster.check()
        except Broken as broken:
            broken.add_note(f"{surface.name}, --seed {number}, sent last: {inputs!r}")
            raise
        number += 1
    return counts


async def run(seconds: float, first_seed: int, console: Console) -> tuple[dict[str, Counter[str]], float]:
    """The counts, and by how many MiB this process, in which all services run, has grown."""
    async with running_cluster() as cluster:
        await cluster.check()
        before = psutil.Process().memory_info().rss
        with Progress(console=console) as progress:
            task = progress.add_task("fuzzing", total=seconds)
            counts = await fuzz(cluster, seconds, first_seed, lambda at: progress.update(task, completed=at))
        return counts, (psutil.Process().memory_info().rss - before) / 2**20


def as_document(counts: dict[str, Counter[str]], about: dict[str, float]) -> dict[str, object]:
    """The results file: what was sent, how, on which commit, and what came of it."""
    command = shlex.join(["python", "-m", "tests.fuzz", *sys.argv[1:]])
    return {
        "num_inputs": sum(outcomes.total() for outcomes in counts.values()),
        **about,
        "outcomes": {name: dict(outcomes.most_common()) for name, outcomes in sorted(counts.items())},
        "environment": dataclasses.asdict(environment([])) | {"command": command},
    }


@click.command()
@click.option("--seconds", default=180.0, show_default=True, help="How long.")
@click.option("--seed", "first_seed", default=0, show_default=True, help="Of the first batch.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the counts there.")
def main(seconds: float, first_seed: int, json_file: Path | None) -> None:
    logging.disable(logging.WARNING)
    counts, growth_mb = asyncio.run(run(seconds, first_seed, Console(stderr=True)))
    table = Table("method", "inputs", "outcomes")
    for name, outcomes in sorted(counts.items()):
        table.add_row(name, str(outcomes.total()), ", ".join(f"{k} {n}" for k, n in outcomes.most_common()))
    total = sum(outcomes.total() for outcomes in counts.values())
    Console().print(table)
    click.echo(f"{total} inputs in {seconds:g} s, no defect; memory grew by {growth_mb:.0f} MiB")
    if json_file:
        document = as_document(counts, {"seconds": seconds, "seed": first_seed, "memory_growth_mib": round(growth_mb)})
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    if growth_mb > _MAX_GROWTH_MB:
        sys.exit(f"memory grew by more than {_MAX_GROWTH_MB} MiB")


if __name__ == "__main__":
    main()
