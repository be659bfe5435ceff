"""Measures the engine on a CPU: steps, plain decoding, concurrency, returning sessions, prefill beside decoding.

    python -m bench.engine              the sample model in bfloat16
    python -m bench.engine --quick      fewer rounds and shorter texts, under a minute

transformers' `generate` runs on the same weights, dtype, threads and machine, in turns with the engine. Its float32 is
measured too, since a processor may be faster in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.engine import report
from bench.engine.figures import Measured, Peer
from bench.engine.measure import MAX_SEQUENCES, EngineBench, PeerBench, read_bandwidth, weight_bytes
from services.cli.bench.machine import environment
from services.common.config import cache_dir
from services.common.errors import ConfigError, ModelUnsupported
from services.engine.models import torch_dtype
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.prepare import resolve_model
from services.engine.progress import Reporter

SHAPES = ((1, 1), (1, 8), (8, 1), (MAX_SEQUENCES, 1))
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure. Lengths are in tokens."""

    rounds: int = 7
    steps_a_round: int = 5
    context: int = 200
    prompt_len: int = 32
    num_tokens: int = 64
    first_turn: int = 1000
    answer: int = 32
    second_turn: int = 32
    ttft_rounds: int = 3
    num_gaps: int = 100
    prefill: int = 4000
    prefill_budget: int = 256
    read_bytes: int = 1 << 30

    @property
    def num_blocks(self) -> int:
        """Of the pool, with room to spare."""
        steps = MAX_SEQUENCES * (self.context + 2 * BLOCK_SIZE + self.prompt_len + self.num_tokens)
        gaps = 4 * (self.prompt_len + self.num_gaps + self.prefill) + self.prefill
        turns = 3 * (self.first_turn + self.answer + self.second_turn)
        return max(steps, gaps, turns) // BLOCK_SIZE + 4 * MAX_SEQUENCES


QUICK = Plan(
    rounds=3, steps_a_round=3, num_tokens=16, ttft_rounds=1, num_gaps=25, prefill=1000, answer=8, read_bytes=1 << 29
)


def run(plan: Plan, model: str, dtype: str, compiled: bool, console: Console) -> Measured:
    """Loads the model for the engine and for its peers, and takes all figures in turns."""
    reporter = Reporter()
    directory = resolve_model(model, cache_dir(), reporter)
    options = EngineOptions(str(directory), cache_dir(), dtype=dtype, num_blocks=plan.num_blocks, block_size=BLOCK_SIZE)
    engine = load_engine(options, reporter)
    bench = EngineBench(engine, plan.prefill_budget)
    measured = Measured(dtype, weight_bytes(engine.runner.model.module))
    peers = _peers(directory, dtype, compiled)
    measured.peers.extend(peer for peer, _ in peers)
    array = torch.ones(plan.read_bytes // 8, dtype=torch.int64)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("steps and rates", total=1 + plan.rounds + plan.ttft_rounds + 1)
        prompt = bench.prompt(plan.prompt_len)
        for _, rate in peers:  # compiles what --compile asks for
            rate(prompt, plan.num_tokens)
        bench.tokens_per_s(1, plan.prompt_len, 2)
        progress.advance(task)
        for _ in range(plan.rounds):
            _round(plan, bench, measured, peers, array)
            progress.advance(task)
        progress.update(task, description="returning sessions")
        for _ in range(plan.ttft_rounds):
            cold, hit = bench.ttft_ms(plan.first_turn, plan.answer, plan.second_turn)
            measured.cold_ttft_ms.append(cold)
            measured.hit_ttft_ms.append(hit)
            progress.advance(task)
        progress.update(task, description="prefill beside decoding")
        alone, beside = bench.gaps_ms(4, plan.prompt_len, plan.num_gaps, plan.prefill)
        measured.alone_gaps_ms.extend(alone)
        measured.beside_prefill_gaps_ms.extend(beside)
        progress.advance(task)
    return measured


Generate = Callable[[tuple[int, ...], int], float]
"""Prompt and number of tokens to tokens a second."""


def _peers(directory: Path, dtype: str, compiled: bool) -> list[tuple[Peer, Generate]]:
    same = PeerBench(directory, torch_dtype(dtype))
    found: list[tuple[Peer, Generate]] = [
        (Peer("generate", dtype), lambda prompt, n: same.tokens_per_s(prompt, n, None, False)),
        (Peer("generate, static cache", dtype), lambda prompt, n: same.tokens_per_s(prompt, n, "static", False)),
    ]
    if compiled:
        peer = Peer("generate, compiled", dtype)
        found.append((peer, lambda prompt, n: same.tokens_per_s(prompt, n, "static", True)))
    if dtype != "float32":
        other = PeerBench(directory, torch.float32)
        found.append((Peer("generate", "float32"), lambda prompt, n: other.tokens_per_s(prompt, n, None, False)))
    return found


def _round(
    plan: Plan, bench: EngineBench, measured: Measured, peers: list[tuple[Peer, Generate]], array: torch.Tensor
) -> None:
    measured.bandwidths.append(read_bandwidth(array))
    for _ in range(plan.steps_a_round):
        for shape in SHAPES:
            measured.step_ms.setdefault(shape, []).append(bench.step_ms(*shape, plan.context))
    prompt = bench.prompt(plan.prompt_len)
    for sequences in (1, MAX_SEQUENCES):
        rate = bench.tokens_per_s(sequences, plan.prompt_len, plan.num_tokens)
        measured.tokens_per_s.setdefault(sequences, []).append(rate)
    for peer, generate in peers:
        peer.tokens_per_s.append(generate(prompt, plan.num_tokens))


@click.command()
@click.option("--model", default="sample", show_default=True, help="Name, directory or repository of the model.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Floating point type of both sides.")
@click.option("--quick", is_flag=True, help="Fewer rounds and shorter texts: under a minute.")
@click.option("--compile", "compiled", is_flag=True, help="Measure transformers compiled too, which takes minutes.")
@click.option("--num-threads", type=click.IntRange(min=0), default=0, help="Of torch, for both; 0: as many as cores.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True)
def main(model: str, dtype: str, quick: bool, compiled: bool, num_threads: int, output: Path) -> None:
    """Measure the engine on a CPU and write engine.json and engine.png."""
    if num_threads:
        torch.set_num_threads(num_threads)
    try:
        measured = run(QUICK if quick else Plan(), model, dtype, compiled, Console(stderr=True))
    except (ConfigError, ModelUnsupported) as error:
        raise click.ClickException(str(error)) from None
    where = environment(sys.argv[1:])
    where = replace(where, command=where.command.replace("outrider", "python -m bench.engine", 1))
    report.show(measured, torch.get_num_threads(), Console())
    report.write(measured, where, torch.get_num_threads(), output)


if __name__ == "__main__":
    main()
