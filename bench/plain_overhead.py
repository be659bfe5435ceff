"""Plain decoding through the coordinator against the simulated engine driven directly, on the same machine in turns.

    python bench/plain_overhead.py --json bench/results/plain_overhead.json

Both decode the same number of tokens with the same simulated forward (20 ms by default). Direct: this process hands a
Decode to the target's engine thread and counts its results. Through: a client asks the coordinator of a cluster of
processes for a generation without draft tokens. The figure is the ratio of their rates in the decode phase.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import sys
import threading
import time
from pathlib import Path

import click

from services.cli.bench.machine import environment
from services.cli.bench.sample import Failure, Key, Mode, measure
from services.cli.cluster import SIMULATED, Cluster, ClusterSpec
from services.cli.failure import CommandFailed
from services.client import GenerateOptions, OutriderClient
from services.common.items import Decode, Identity, Open, Refused, Tokens
from services.common.values import SamplingParams, VerificationMethod
from services.target.config import TargetConfig
from services.target.server import build

PROMPT = "The quick brown fox"


def direct_ms_per_token(step_ms: float, num_tokens: int) -> float:
    """Milliseconds a token of the target's engine, from its first token to its last."""
    built = build(TargetConfig(port=0, model=SIMULATED, simulated_step_ms=step_ms))
    prefix = tuple(PROMPT.encode())
    identity = Identity("s", 1, 1, 0, len(prefix))
    sampling, method = SamplingParams(temperature=0.0), VerificationMethod.COUPLED
    arrivals: list[int] = []
    done = threading.Event()

    def deliver(results: list[Tokens | Refused]) -> None:
        for result in results:
            if isinstance(result, Refused):
                done.set()
                raise result.error
            arrivals.extend([time.perf_counter_ns()] * len(result.token_ids))
        if len(arrivals) >= num_tokens:
            done.set()

    built.engine.start()
    try:
        opening = Open(identity, prefix, len(prefix), frozenset(), sampling, method, num_tokens)
        built.engine.connect(deliver).submit([opening, Decode(identity, num_tokens)])
        done.wait(num_tokens * (step_ms + 50) / 1e3)
    finally:
        built.engine.stop()
    if len(arrivals) != num_tokens:
        raise CommandFailed(f"the engine gave {len(arrivals)} of {num_tokens} tokens")
    return (arrivals[-1] - arrivals[0]) / 1e6 / (num_tokens - 1)


async def through_ms_per_token(address: str, num_tokens: int) -> float:
    """Milliseconds a token at a client of the coordinator, from the first message with tokens to the last."""
    options = GenerateOptions(max_tokens=num_tokens, temperature=0.0, num_draft_tokens=0, ignore_eos=True)
    async with OutriderClient(address) as client:
        sample = await measure(client, Key(0, 0, "plain"), Mode.PLAIN, PROMPT, options, "")
    if isinstance(sample, Failure):
        raise sample.error
    if sample.tpot_ns is None:
        raise CommandFailed("the generation was too short to measure")
    return sample.tpot_ns / 1e6


@click.command()
@click.option("--step-ms", type=float, default=20.0, show_default=True, help="Milliseconds of a simulated forward.")
@click.option("--num-tokens", type=click.IntRange(min=8), default=200, show_default=True, help="Tokens a run.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Runs of each kind, in turns."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(step_ms: float, num_tokens: int, repeats: int, json_file: Path | None) -> None:
    """Compare plain decoding through the coordinator with the engine driven directly."""
    spec = ClusterSpec(target=SIMULATED, drafter=SIMULATED, simulated_step_ms=step_ms)
    direct, through = [], []
    with Cluster(spec) as cluster:
        asyncio.run(through_ms_per_token(cluster.address, 8))
        for _ in range(repeats):
            direct.append(direct_ms_per_token(step_ms, num_tokens))
            through.append(asyncio.run(through_ms_per_token(cluster.address, num_tokens)))
    ratio = statistics.median(direct) / statistics.median(through)
    click.echo(f"direct  {statistics.median(direct):.3f} ms a token")
    click.echo(f"through {statistics.median(through):.3f} ms a token")
    click.echo(f"the coordinator reaches {ratio:.3f} of the engine's rate")
    if json_file is not None:
        command = dataclasses.asdict(environment(sys.argv[1:])) | {"command": "python bench/plain_overhead.py"}
        figures = {
            "step_ms": step_ms,
            "num_tokens": num_tokens,
            "direct_ms_per_token": [round(value, 4) for value in direct],
            "through_ms_per_token": [round(value, 4) for value in through],
            "ratio": round(ratio, 4),
            "environment": command,
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
