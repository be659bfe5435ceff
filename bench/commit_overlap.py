"""Whether writes to Redis hide behind the next draft: tokens a second with a slow Redis against those with a quick one.

    python -m bench.commit_overlap --json bench/results/commit_overlap.json

A cluster of processes with simulated workers (target 10 ms a step, draft 8 ms a round) reaches its Redis through a
proxy that delays; runs without and with the delay take turns. Were each commit waited for, 6 ms would leave
18/24 = 0.75.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
from redis import Redis
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.proxy import ProxyThread, round_trip_ms
from services.cli.bench.machine import environment
from services.cli.cluster import SIMULATED, Cluster, ClusterSpec
from services.client import GenerateOptions, OutriderClient
from tests.fakes.redis_process import RedisProcess, running

NUM_DRAFT_TOKENS = 4
TARGET_MS, DRAFT_MS = 10.0, 8.0
LEAST_RATIO = 0.95


class ProxiedCluster(Cluster):
    """A cluster on a Redis that is there already."""

    def __init__(self, spec: ClusterSpec, redis_url: str) -> None:
        super().__init__(spec)
        self._redis_url = redis_url

    def _start_redis(self) -> str:
        return self._redis_url


async def tokens_per_s(address: str, num_tokens: int) -> float:
    """At the client, from the first chunk of a generation to its last."""
    options = GenerateOptions(
        max_tokens=num_tokens, temperature=0.0, ignore_eos=True, num_draft_tokens=NUM_DRAFT_TOKENS
    )
    arrivals: list[tuple[float, int]] = []
    async with OutriderClient(address) as client:
        async for chunk in client.generate("The quick brown fox", options):
            arrivals.append((time.perf_counter(), len(chunk.tokens)))
    return sum(count for _, count in arrivals[1:]) / (arrivals[-1][0] - arrivals[0][0])


def measure(
    store: RedisProcess, delay_ms: float, num_tokens: int, repeats: int, console: Console
) -> tuple[list[float], list[float], float, float]:
    """Rates without and with the delay, in turns, and both round trips' milliseconds."""
    spec = ClusterSpec(
        target=SIMULATED,
        drafter=SIMULATED,
        simulated_step_ms=TARGET_MS,
        simulated_token_ms=DRAFT_MS / NUM_DRAFT_TOKENS,
    )
    rates: dict[float, list[float]] = {0.0: [], delay_ms: []}
    with (
        ProxyThread(store.port) as through,
        Redis(port=through.proxy.port) as client,
        ProxiedCluster(spec, f"redis://{through.proxy.address}/0") as cluster,
    ):
        one_way_s = {0.0: 0.0, delay_ms: through.calibrate(delay_ms, client.ping)}
        round_trips = []
        for delay_s in one_way_s.values():
            through.proxy.delay_s = delay_s
            round_trips.append(round_trip_ms(client.ping))
        asyncio.run(tokens_per_s(cluster.address, 32))
        for _ in track(range(repeats), "pairs of runs", console=console):
            for delay in rates:
                through.proxy.delay_s = one_way_s[delay]
                rates[delay].append(asyncio.run(tokens_per_s(cluster.address, num_tokens)))
    return rates[0.0], rates[delay_ms], round_trips[0], round_trips[1]


@click.command()
@click.option("--delay-ms", type=click.FloatRange(min=0.1), default=6.0, show_default=True, help="Added round trip.")
@click.option("--num-tokens", type=click.IntRange(min=16), default=500, show_default=True, help="Tokens a run.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=7, show_default=True, help="Runs of each kind, in turns."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(delay_ms: float, num_tokens: int, repeats: int, json_file: Path | None) -> None:
    """Compare tokens a second with and without a delay before Redis. Exit code 1 below 0.95."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as directory, running(Path(directory)) as store:
        quick, slow, quick_ms, slow_ms = measure(store, delay_ms, num_tokens, repeats, console)
    ratio = statistics.median(slow) / statistics.median(quick)
    table = Table("Redis round trip", "tokens/s, median", "lowest", "highest")
    for trip_ms, rates in ((quick_ms, quick), (slow_ms, slow)):
        table.add_row(f"{trip_ms:.2f} ms", f"{statistics.median(rates):.1f}", f"{min(rates):.1f}", f"{max(rates):.1f}")
    Console().print(table)
    click.echo(f"ratio {ratio:.3f}; at least {LEAST_RATIO} is wanted, waiting for each commit would give 0.75")
    if json_file is not None:
        figures = {
            "target_ms": TARGET_MS,
            "draft_ms": DRAFT_MS,
            "delay_ms": delay_ms,
            "redis_round_trip_ms": [round(quick_ms, 3), round(slow_ms, 3)],
            "num_tokens": num_tokens,
            "tokens_per_s": [round(rate, 2) for rate in quick],
            "delayed_tokens_per_s": [round(rate, 2) for rate in slow],
            "ratio": round(ratio, 4),
            "environment": dataclasses.asdict(environment(sys.argv[1:]))
            | {"command": "python -m bench.commit_overlap"},
        }
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(0 if ratio >= LEAST_RATIO else 1)


if __name__ == "__main__":
    main()
