"""`python -m tests.chaos --faults 150`: faults, and what the clients saw of them; status 1 if anything was lost.

Owns: the options, and the composition. The logs of all processes stay where a run has failed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
import numpy as np
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.cli.bench.machine import environment
from services.cli.cluster import SAMPLE, SAMPLE_HEAD, SIMULATED, ClusterSpec
from tests.chaos.conductor import Conductor
from tests.chaos.faults import DECK, faults
from tests.chaos.fleet import Fleet, FleetSpec, running_fleet
from tests.chaos.load import Load
from tests.chaos.mutants import run_mutated
from tests.chaos.replies import requests
from tests.chaos.report import FULL_RUN, Findings, document, show
from tests.chaos.text import text_of_tokens
from tests.chaos.watch import Watch
from tests.mutants.mutants import MUTANTS

LEASE_S, KEEPALIVE_S = 1.5, 8.0
_IDLE_S = 20.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What differs between simulated models and the sample ones."""

    fleet: FleetSpec
    num_clients: int
    num_requests: int
    token_ids: range
    max_tokens: range
    reply_s: float
    num_faults: int
    """Unless told otherwise."""


SETUPS = {
    SIMULATED: Setup(
        FleetSpec(
            ClusterSpec(
                target=SIMULATED,
                draft=SIMULATED,
                drafter=SIMULATED,
                simulated_step_ms=80.0,
                simulated_token_ms=6.0,
            )
        ),
        num_clients=32,
        num_requests=48,
        token_ids=range(32, 127),
        max_tokens=range(40, 160),
        reply_s=90.0,
        num_faults=FULL_RUN,
    ),
    SAMPLE: Setup(
        FleetSpec(
            ClusterSpec(target=SAMPLE, drafter="suffix,features", draft=SAMPLE_HEAD, dtype="float32"),
            target_timeout_s=20.0,
        ),
        num_clients=6,
        num_requests=12,
        token_ids=range(1000, 40_000),
        max_tokens=range(16, 48),
        reply_s=240.0,
        num_faults=DECK,
    ),
}


async def run(setup: Setup, num_faults: int, seed: int, directory: Path) -> Findings:
    choose = Random(seed)
    async with running_fleet(setup.fleet, directory) as fleet:
        watch = Watch(fleet.redis_port)
        try:
            return await _run(setup, num_faults, choose, directory, fleet, watch)
        finally:
            await watch.aclose()


async def _run(setup: Setup, num_faults: int, choose: Random, directory: Path, fleet: Fleet, watch: Watch) -> Findings:
    asked = requests(setup.num_requests, choose, token_ids=setup.token_ids, max_tokens=setup.max_tokens)
    load = Load(fleet.addresses, asked, watch, setup.reply_s, text_of_tokens(fleet.tokenizer))
    conductor = Conductor(fleet, load, watch, choose)
    with _progress(num_faults) as progress:
        task = progress.add_task("without faults", total=num_faults)
        await load.run_undisturbed(setup.num_clients)
        began_at = time.monotonic()
        sampling = asyncio.create_task(conductor.sample_memory())
        running = asyncio.create_task(load.run(setup.num_clients, choose))

        def on_fault(what: str) -> None:
            progress.update(task, description=what, completed=conductor.counts.total())
            for trouble in load.tally.news():
                progress.console.print(trouble, style="red", markup=False, highlight=False)

        try:
            await conductor.conduct(faults(choose, LEASE_S, KEEPALIVE_S), num_faults, on_fault)
            progress.update(task, description="the last replies", completed=num_faults)
            load.stop()
            await running
        finally:
            running.cancel()
            sampling.cancel()
        held = await fleet.wait_idle(_IDLE_S)
    return Findings(
        counts=conductor.counts,
        tally=load.tally,
        waits_s=load.waits_s,
        gap_s=float(np.percentile(load.gaps_s, 99)),
        num_early=watch.num_early,
        num_looks=watch.num_looks,
        num_stale_writes=watch.num_stale_writes,
        num_late_writes=watch.num_late_writes,
        held=held,
        num_crashed=len(conductor.crashes),
        num_tracebacks=await asyncio.to_thread(count_tracebacks, directory),
        growth={role: growth for role, growth in conductor.memory.growth().items() if role != "redis"},
        seconds=time.monotonic() - began_at,
    )


def count_tracebacks(directory: Path) -> int:
    """In all logs."""
    return sum(log.read_text(errors="replace").count("Traceback (") for log in directory.glob("*.err"))


def _progress(num_faults: int) -> Progress:
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


@click.command()
@click.option("--faults", "num_faults", type=click.IntRange(1), help="How many; 150, or 13 on sample models.")
@click.option("--models", type=click.Choice(sorted(SETUPS)), default=SIMULATED, show_default=True)
@click.option("--clients", type=int, help="How many at once.")
@click.option("--seed", default=1, show_default=True, help="Of requests and faults.")
@click.option("--mutant", type=click.Choice([m.name for m in MUTANTS]), help="Run with this defect in the services.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the findings there.")
def main(
    num_faults: int | None, models: str, clients: int | None, seed: int, mutant: str | None, json_file: Path | None
) -> None:
    """Kill, pause and cut off parts under load; status 1 if anything was lost."""
    if mutant:
        others = [argument for argument in sys.argv[1:] if argument not in (mutant, "--mutant", f"--mutant={mutant}")]
        sys.exit(run_mutated(mutant, others))
    setup = SETUPS[models]
    if clients:
        setup = dataclasses.replace(setup, num_clients=clients)
    directory = Path(tempfile.mkdtemp(prefix="outrider-chaos-"))
    findings = uvloop.run(run(setup, num_faults or setup.num_faults, seed, directory))
    show(findings, Console())
    if json_file:
        command = shlex.join(["python", "-m", "tests.chaos", *sys.argv[1:]])
        taken = dataclasses.asdict(environment([])) | {"command": command}
        about = {"models": models, "num_clients": setup.num_clients, "seed": seed, "environment": taken}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(document(findings, about), indent=2) + "\n")
    if findings.failed:
        sys.exit(f"the logs are in {directory}")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
