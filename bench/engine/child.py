"""What must be measured in a process of its own: `python -m bench.engine.child KIND`, one JSON object on the last line.

Owns: the measurements that bring their own thread settings, or that may hang or fail without ending the benchmark.
Must not know: the parent's figures.

    compiled      transformers' `generate` with a static cache, compiled
    continuous    transformers' continuous batching, 16 prompts at once
    lag           how late a target worker's event loop is while its engine computes steps
    steps         steps for as many seconds as each line of stdin says, after `ready`: two of these share the cores
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import click

from bench.engine.figures import percentile
from bench.engine.measure import MAX_SEQUENCES, EngineBench, PeerBench, opening
from services.common.config import cache_dir
from services.common.items import Decode
from services.engine.models import torch_dtype
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from services.target.config import TargetConfig
from services.target.server import running_target

LAG_INTERVAL_S = 0.001
LAG_SECONDS = 6.0
CONTEXT = 200


def compiled(model: Path, dtype: str, prompt_len: int, num_tokens: int) -> dict[str, Any]:
    """The first call compiles."""
    peer = PeerBench(model, torch_dtype(dtype))
    prompt = tuple(range(100, 100 + prompt_len))
    started = time.perf_counter()
    peer.tokens_per_s(prompt, num_tokens, "static", True)
    compile_s = time.perf_counter() - started
    return {
        "tokens_per_s": [peer.tokens_per_s(prompt, num_tokens, "static", True) for _ in range(3)],
        "compile_s": compile_s,
    }


def continuous(model: Path, dtype: str, prompt_len: int, num_tokens: int) -> dict[str, Any]:
    """Tokens a second of 16 requests that come together, from then until all are done; the first run warms up."""
    peer = PeerBench(model, torch_dtype(dtype))
    prompts = [[(line * 37 + n) % 10_000 for n in range(prompt_len)] for line in range(MAX_SEQUENCES)]
    return {"tokens_per_s": [peer.continuous_tokens_per_s(prompts, num_tokens) for _ in range(2)][1:]}


def steps(model: Path, dtype: str, rows: int) -> dict[str, Any]:
    """Answers each line, a number of seconds, with the steps a second in them."""
    options = EngineOptions(str(model), cache_dir(), dtype=dtype, num_blocks=64, block_size=16, num_threads=1)
    bench = EngineBench(load_engine(options, Reporter(quiet=True)), 256)
    step = bench.step(1, rows, CONTEXT)
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        deadline, count, started = time.perf_counter() + float(line), 0, time.perf_counter()
        while time.perf_counter() < deadline:
            step()
            count += 1
        print(json.dumps(count / (time.perf_counter() - started)), flush=True)
    return {}


def lag(model: Path, dtype: str, threads: int) -> dict[str, Any]:
    """With so many threads of the forward; 0: one a core."""
    config = TargetConfig(host="127.0.0.1", port=0, model=str(model), dtype=dtype, threads=threads, num_blocks=1000)
    return asyncio.run(_lag(config))


async def _lag(config: TargetConfig) -> dict[str, Any]:
    async with running_target(config) as worker:
        idle = await _lags_ms(LAG_SECONDS / 3)
        loop = asyncio.get_running_loop()
        connection = worker.engine.connect(lambda results: loop.call_soon_threadsafe(len, results))
        for line in range(4):
            opened = opening(str(line), tuple(range(line, line + 64)), 64, 2000)
            connection.submit([opened, Decode(opened.identity, 2000)])
        await asyncio.sleep(0.5)
        busy = await _lags_ms(LAG_SECONDS)
        connection.close()
    return {
        "idle_p99_ms": percentile(idle, 99),
        "busy_p50_ms": percentile(busy, 50),
        "busy_p99_ms": percentile(busy, 99),
        "busy_max_ms": max(busy),
        "switch_interval_ms": sys.getswitchinterval() * 1e3,
    }


async def _lags_ms(seconds: float) -> list[float]:
    """How much later than asked the loop comes back to a sleeper."""
    found, deadline = [], time.perf_counter() + seconds
    while (now := time.perf_counter()) < deadline:
        await asyncio.sleep(LAG_INTERVAL_S)
        found.append((time.perf_counter() - now - LAG_INTERVAL_S) * 1e3)
    return found


@click.command()
@click.argument("kind", type=click.Choice(["compiled", "continuous", "lag", "steps"]))
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--dtype", required=True)
@click.option("--prompt-len", default=32)
@click.option("--num-tokens", default=64)
@click.option("--rows", default=1)
@click.option("--threads", default=0)
def main(kind: str, model: Path, dtype: str, prompt_len: int, num_tokens: int, rows: int, threads: int) -> None:
    """Measure one thing and print it."""
    logging.disable(logging.WARNING)
    match kind:
        case "compiled":
            found = compiled(model, dtype, prompt_len, num_tokens)
        case "continuous":
            found = continuous(model, dtype, prompt_len, num_tokens)
        case "lag":
            found = lag(model, dtype, threads)
        case _:
            found = steps(model, dtype, rows)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
