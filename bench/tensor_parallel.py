"""One process against several ranks on the same prompts: equal tokens, memory of each rank, time of a step.

    python bench/tensor_parallel.py --json bench/results/tensor_parallel.json

Each loads the sample target in processes of its own and decodes all prompts together, greedily in float32, then
verifies the last tokens again as a proposal. The ranks share this machine's cores: the times tell what communication
costs here, not what several devices gain.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil

from services.cli.bench.machine import environment
from services.cli.prompts import load_prompts, spread
from services.common.config import cache_dir
from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.common.worker_main import set_threads

NUM_PROMPTS = 4
NUM_DRAFTED = 7
MAX_PROMPT_LEN = 64


def measure(num_ranks: int, num_tokens: int) -> dict[str, object]:
    """What `num_ranks` processes make of the prompts, and what it takes them."""
    set_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    from transformers import AutoTokenizer

    from services.engine.block_manager import BlockManager
    from services.engine.kv_pool import block_bytes
    from services.engine.memory import MIB, module_bytes
    from services.engine.paged_model import EngineOptions, PagedTargetModel, load_engine
    from services.engine.prepare import SAMPLE, resolve_model
    from services.engine.progress import Reporter
    from services.engine.sequence import Sequence
    from services.engine.step import Work
    from services.engine.verifier import Verifier

    reporter = Reporter()
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SAMPLE, cache_dir(), reporter))
    threads = int(os.environ["OMP_NUM_THREADS"])
    engine = load_engine(
        EngineOptions(SAMPLE, cache_dir(), num_blocks=256, num_ranks=num_ranks, num_threads=threads), reporter
    )
    model, blocks = PagedTargetModel(engine, Verifier()), BlockManager(engine.num_blocks, engine.block_size)
    prompts = [
        tokenizer(conversation.turns[0])["input_ids"][:MAX_PROMPT_LEN]
        for conversation in spread(load_prompts(), NUM_PROMPTS)
    ]
    greedy, method = SamplingParams(temperature=0.0), VerificationMethod.COUPLED
    sequences = [
        Sequence.from_open(
            Open(Identity(str(i), 1, 1, 0, len(prompt)), tuple(prompt), len(prompt), frozenset(), greedy, method, 1000)
        )
        for i, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        blocks.extend(sequence, len(sequence) + num_tokens + NUM_DRAFTED)
    step_ms: list[float] = []
    for _ in range(num_tokens):
        started = time.perf_counter()
        verdicts = model.step([Work(sequence, sequence.num_uncached_tokens, None, 1) for sequence in sequences])
        step_ms.append(1e3 * (time.perf_counter() - started))
        for sequence, verdict in zip(sequences, verdicts, strict=True):
            assert verdict is not None
            sequence.num_cached = len(sequence)
            sequence.tokens.extend(verdict.token_ids)
    tokens = [sequence.tokens[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]

    proposals = [Proposal(0, tuple(sequence.tokens[-NUM_DRAFTED:])) for sequence in sequences]
    for sequence in sequences:
        del sequence.tokens[-NUM_DRAFTED:]
        sequence.num_cached = len(sequence) - 1
    works = [Work(s, 1, proposal, 1 + NUM_DRAFTED) for s, proposal in zip(sequences, proposals, strict=True)]
    verdicts = model.step(works)
    num_pool_bytes = engine.num_blocks * block_bytes(
        engine.runner.model.layer_shapes, engine.block_size, engine.runner.model.dtype
    )
    pids = [os.getpid(), *(engine.ranks.pids if engine.ranks else [])]
    figures = {
        "num_ranks": num_ranks,
        "threads_per_rank": threads,
        "tokens": tokens,
        "verified": [verdict.num_accepted_tokens for verdict in verdicts if verdict],
        "self_check_difference": engine.self_check_difference,
        "decode_step_ms_p50": round(statistics.median(step_ms[1:]), 1),
        "weights_mib_per_rank": round(module_bytes(engine.runner.model.module) / MIB, 1),
        "kv_pool_mib_per_rank": round(num_pool_bytes / MIB, 1),
        "resident_mib": [round(psutil.Process(pid).memory_info().rss / MIB) for pid in pids],
    }
    engine.close()
    return figures


def measured(num_ranks: int, num_tokens: int) -> dict[str, object]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--ranks", str(num_ranks), "--num-tokens", str(num_tokens), "--alone"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    figures: dict[str, object] = json.loads(done.stdout)
    return figures


@click.command()
@click.option("--ranks", type=click.IntRange(min=1), default=3, show_default=True, help="Processes to cut it for.")
@click.option("--num-tokens", type=click.IntRange(min=16), default=24, show_default=True, help="Tokens a prompt.")
@click.option("--alone", is_flag=True, help="Print the figures of --ranks processes and compare nothing.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(ranks: int, num_tokens: int, alone: bool, json_file: Path | None) -> None:
    """Compare one process with several ranks on the sample target."""
    if alone:
        click.echo(json.dumps(measure(ranks, num_tokens)))
        return
    runs = [measured(1, num_tokens), measured(ranks, num_tokens)]
    equal = runs[0]["tokens"] == runs[1]["tokens"]
    for run in runs:
        click.echo(
            f"{run['num_ranks']} ranks: {run['decode_step_ms_p50']} ms a step of {NUM_PROMPTS} rows, "
            f"{run['weights_mib_per_rank']} MiB of weights and {run['kv_pool_mib_per_rank']} MiB of KV pool in each"
        )
    click.echo(f"equal tokens: {'yes' if equal else 'no'}")
    if json_file is not None:
        command = dataclasses.asdict(environment(sys.argv[1:])) | {"command": "python bench/tensor_parallel.py"}
        shown = [{key: value for key, value in run.items() if key != "tokens"} for run in runs]
        figures = {"equal_tokens": equal, "num_prompts": NUM_PROMPTS, "num_tokens": num_tokens, "runs": shown}
        json_file.write_text(json.dumps(figures | {"environment": command}, indent=2) + "\n")
    if not equal:
        raise click.ClickException("the tokens differ")


if __name__ == "__main__":
    main()
