"""Measures the engine on a CPU: steps, plain decoding, concurrency, returning sessions, prefill beside decoding.

    python -m bench.engine              the sample model in bfloat16
    python -m bench.engine --quick      fewer rounds and shorter texts, without other processes, under a minute

transformers' `generate` runs on the same weights, dtype, threads and machine, in turns with the engine. Its float32 is
measured too, since a processor may be faster in it. What may hang, compiles, or needs other thread settings runs in
processes of its own behind the rounds (bench.engine.children): compiled `generate`, transformers' continuous batching,
draft and target beside each other, and the lag of a worker's event loop.
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
from bench.engine.children import ChildModel, measure, share_cores
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
NUM_CHILDREN = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure. Lengths are in tokens."""

    rounds: int = 5
    steps_a_round: int = 5
    context: int = 200
    prompt_len: int = 32
    num_tokens: int = 64
    first_turn: int = 1000
    answer: int = 32
    second_turn: int = 32
    ttft_rounds: int = 3
    gap_rounds: int = 3
    num_gaps: int = 100
    prefill: int = 4000
    prefill_budget: int = 256
    read_bytes: int = 1 << 30
    child_limit_s: float = 100.0
    """For each process of its own; 0 runs none."""

    @property
    def num_blocks(self) -> int:
        """Of the pool, with room to spare."""
        steps = MAX_SEQUENCES * (self.context + 2 * BLOCK_SIZE + self.prompt_len + self.num_tokens)
        gaps = 4 * (self.prompt_len + self.num_gaps + self.prefill) + self.prefill
        turns = 3 * (self.first_turn + self.answer + self.second_turn)
        return max(steps, gaps, turns) // BLOCK_SIZE + 4 * MAX_SEQUENCES


QUICK = Plan(
    rounds=3,
    steps_a_round=3,
    num_tokens=16,
    ttft_rounds=1,
    gap_rounds=1,
    num_gaps=25,
    prefill=1000,
    answer=8,
    read_bytes=1 << 29,
    child_limit_s=0,
)


def run(plan: Plan, model: str, dtype: str, console: Console) -> Measured:
    """Loads the model for the engine and for its peers, and takes all figures in turns."""
    reporter = Reporter()
    directory = resolve_model(model, cache_dir(), reporter)
    options = EngineOptions(str(directory), cache_dir(), dtype=dtype, num_blocks=plan.num_blocks, block_size=BLOCK_SIZE)
    engine = load_engine(options, reporter)
    bench = EngineBench(engine, plan.prefill_budget)
    measured = Measured(dtype, weight_bytes(engine.runner.model.module))
    peers = _peers(directory, dtype)
    measured.peers.extend(peer for peer, _ in peers)
    array = torch.ones(plan.read_bytes // 8, dtype=torch.int64)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            "steps and rates", total=1 + plan.rounds + plan.ttft_rounds + plan.gap_rounds + NUM_CHILDREN
        )
        prompt = bench.prompt(plan.prompt_len)
        for _, rate in peers:
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
        for _ in range(plan.gap_rounds):
            alone, beside = bench.gaps_ms(4, plan.prompt_len, plan.num_gaps, plan.prefill)
            measured.alone_gaps_ms.append(alone)
            measured.beside_prefill_gaps_ms.append(beside)
            progress.advance(task)
        if plan.child_limit_s:
            progress.update(task, description="processes of their own")
            _run_children(plan, ChildModel(directory, dtype), measured, lambda: progress.advance(task))
    return measured


def _run_children(plan: Plan, model: ChildModel, measured: Measured, advance: Callable[[], None]) -> None:
    lengths = ("--prompt-len", str(plan.prompt_len), "--num-tokens", str(plan.num_tokens))
    for kind, name in (("compiled", "generate, compiled"), ("continuous", "continuous batching, 16 at once")):
        found = measure(model, kind, lengths, plan.child_limit_s, passive=False)
        if "failed" in found:
            measured.failed_peers[name] = found["failed"]
        elif kind == "compiled":
            measured.peers.append(Peer(name, model.dtype, found["tokens_per_s"]))
        measured.continuous.update(found if kind == "continuous" else {})
        advance()
    measured.sharing.update(share_cores(model, {"target": 5, "draft": 1}, 5.0))
    advance()
    for threads in (0, 1):
        measured.lag[threads] = measure(model, "lag", ("--threads", str(threads)), plan.child_limit_s, passive=True)
    advance()


Generate = Callable[[tuple[int, ...], int], float]
"""Prompt and number of tokens to tokens a second."""


def _peers(directory: Path, dtype: str) -> list[tuple[Peer, Generate]]:
    same = PeerBench(directory, torch_dtype(dtype))
    found: list[tuple[Peer, Generate]] = [
        (Peer("generate", dtype), lambda prompt, n: same.tokens_per_s(prompt, n, None, False)),
        (Peer("generate, static cache", dtype), lambda prompt, n: same.tokens_per_s(prompt, n, "static", False)),
    ]
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
        rate = bench.burst_tokens_per_s(sequences, plan.prompt_len, plan.num_tokens)
        measured.burst_tokens_per_s.setdefault(sequences, []).append(rate)
    for peer, generate in peers:
        peer.tokens_per_s.append(generate(prompt, plan.num_tokens))


@click.command()
@click.option("--model", default="sample", show_default=True, help="Name, directory or repository of the model.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Floating point type of both sides.")
@click.option("--quick", is_flag=True, help="Fewer rounds and shorter texts: under a minute.")
@click.option("--num-threads", type=click.IntRange(min=0), default=0, help="Of torch, for both; 0: as many as cores.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True)
def main(model: str, dtype: str, quick: bool, num_threads: int, output: Path) -> None:
    """Measure the engine on a CPU and write engine.json and engine.png."""
    if num_threads:
        torch.set_num_threads(num_threads)
    try:
        measured = run(QUICK if quick else Plan(), model, dtype, Console(stderr=True))
    except (ConfigError, ModelUnsupported) as error:
        raise click.ClickException(str(error)) from None
    where = environment(sys.argv[1:])
    where = replace(where, command=where.command.replace("outrider", "python -m bench.engine", 1))
    report.show(measured, torch.get_num_threads(), Console())
    report.write(measured, where, torch.get_num_threads(), output)


if __name__ == "__main__":
    main()
