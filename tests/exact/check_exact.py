"""Whether the service's tokens are the target's: `make check-exact`.

Greedy output, from a whole cluster of processes, is compared token for token with transformers' own `generate`; at
other temperatures coupled output is compared with the cluster's own plain decoding of one request at a time. First
differences are judged against transformers' logits: near-ties are counted, anything else is a defect.

Owns: the matrix of configurations and the verdict. Must not know: how the services work.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from services.cli.bench.machine import environment
from services.cli.cluster import Cluster, ClusterSpec, prepare_model
from services.client.client import OutriderClient
from services.client.values import Chat, GenerateOptions
from services.common.drafters import needs_model, parse_chain
from services.common.values import SamplingParams
from tests.exact.reference import Difference, Reference

MAX_DIFFERING_SHARE = 0.01
PROMPTS = Path(__file__).parents[2] / "services" / "cli" / "prompts.jsonl"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration of the matrix. `num_draft_tokens` 0 is plain decoding."""

    drafter: str
    num_draft_tokens: int
    concurrency: int
    temperature: float

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, seed=7)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a configuration's outputs were."""

    case: Case
    num_outputs: int
    num_near_ties: int
    num_defects: int
    acceptance_rate: float | None
    gaps: tuple[float, ...]

    @property
    def num_identical(self) -> int:
        return self.num_outputs - self.num_near_ties - self.num_defects


def matrix(
    drafters: Iterable[str], lengths: Iterable[int], concurrency: int, temperatures: Iterable[float]
) -> list[Case]:
    """Plain decoding and every drafter at every K, with `concurrency` requests at once; plain and one K also alone."""
    lengths, drafters, cases = list(lengths), list(drafters), []
    for temperature in temperatures:
        for drafter in drafters:
            cases += [Case(drafter, k, concurrency, temperature) for k in lengths]
        middle = lengths[len(lengths) // 2]
        cases += [Case(drafters[0], 0, n, temperature) for n in (concurrency, 1)]
        cases += [Case(drafters[0], middle, 1, temperature)]
    return sorted(
        set(cases), key=lambda case: (case.drafter, case.temperature, case.num_draft_tokens, case.concurrency)
    )


def read_prompts(path: Path, limit: int) -> list[str]:
    """First turns, spread evenly over the categories in the file's order."""
    by_category: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        prompt = json.loads(line)
        by_category.setdefault(prompt["category"], []).append(prompt["turns"][0])
    rounds = max(len(texts) for texts in by_category.values())
    spread = [texts[i] for i in range(rounds) for texts in by_category.values() if i < len(texts)]
    return spread[:limit]


def random_draft(target: Path, directory: Path) -> Path:
    """A small random Llama with the target's vocabulary: a bad drafter that computes for real."""
    config = json.loads((target / "config.json").read_text())
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=config["max_position_embeddings"],
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (target / name).exists():
            shutil.copy(target / name, directory)
    return directory


async def run_case(
    address: str, case: Case, prompts: Sequence[str], max_tokens: int
) -> list[tuple[tuple[int, ...], ...]]:
    """(prompt ids, generated ids) of every prompt, in order, and the acceptance as a third pair."""
    gate = asyncio.Semaphore(case.concurrency)
    options = GenerateOptions(
        max_tokens=max_tokens,
        temperature=case.temperature,
        seed=case.sampling.seed,
        num_draft_tokens=case.num_draft_tokens,
    )
    async with OutriderClient(address) as client:

        async def one(text: str) -> tuple[tuple[int, ...], ...]:
            async with gate:
                result = await client.complete(Chat.of(text), options)
                stats = result.statistics
                return result.prompt_token_ids, result.token_ids, (stats.num_accepted_tokens, stats.num_draft_tokens)

        return list(await asyncio.gather(*map(one, prompts)))


def judge(
    reference: Reference,
    case: Case,
    expected: Sequence[tuple[int, ...]],
    outputs: Sequence[tuple[tuple[int, ...], ...]],
) -> Outcome:
    """Compares outputs with what was expected of them, prompt by prompt."""
    differences: list[Difference] = []
    for tokens, (prompt_ids, actual, _) in zip(expected, outputs, strict=True):
        if difference := reference.first_difference(prompt_ids, tokens, actual, case.sampling):
            differences.append(difference)
    accepted, drafted = (sum(output[2][i] for output in outputs) for i in (0, 1))
    near = sum(difference.near_tie for difference in differences)
    return Outcome(
        case=case,
        num_outputs=len(outputs),
        num_near_ties=near,
        num_defects=len(differences) - near,
        acceptance_rate=accepted / drafted if drafted else None,
        gaps=tuple(difference.gap for difference in differences),
    )


def check(
    model: Path,
    cases: Sequence[Case],
    prompts: Sequence[str],
    max_tokens: int,
    num_threads: int,
    dtype: str = "float32",
    draft: str = "",
) -> list[Outcome]:
    """Runs every case on clusters started for it; greedy float32 against transformers, the rest against plain decoding.

    `draft` is that of drafters that need one; empty: a small random one, of which next to nothing is accepted.
    Raises AssertionError if the service tokenizes a prompt otherwise than transformers.
    """
    reference = Reference(model, num_threads)
    prompt_ids = [reference.prompt_ids(text) for text in prompts]
    greedy: list[tuple[int, ...]] = []
    outcomes = []
    console = Console(stderr=True)
    with Progress(console=console) as progress, tempfile.TemporaryDirectory(prefix="outrider-exact-") as folder:
        if dtype == "float32" and any(case.temperature == 0 for case in cases):
            bar = progress.add_task("transformers generate", total=len(prompts))
            for ids in prompt_ids:
                greedy.append(reference.generate(ids, max_tokens))
                progress.advance(bar)
        bar = progress.add_task("cases", total=len(cases))
        plain: dict[float, list[tuple[int, ...]]] = {0.0: greedy} if greedy else {}
        for drafter in dict.fromkeys(case.drafter for case in cases):
            drafts = (draft or str(random_draft(model, Path(folder)))) if needs_model(parse_chain(drafter)) else ""
            spec = ClusterSpec(target=str(model), draft=drafts, drafter=drafter, dtype=dtype, threads=num_threads)
            with Cluster(spec) as cluster:
                for case in (case for case in cases if case.drafter == drafter):
                    if case.temperature not in plain:
                        alone = Case(drafter, 0, 1, case.temperature)
                        alone_outputs = asyncio.run(run_case(cluster.address, alone, prompts, max_tokens))
                        plain[case.temperature] = [output[1] for output in alone_outputs]
                    outputs = asyncio.run(run_case(cluster.address, case, prompts, max_tokens))
                    assert [output[0] for output in outputs] == prompt_ids, "prompt tokens differ from transformers'"
                    outcome = judge(reference, case, plain[case.temperature], outputs)
                    outcomes.append(outcome)
                    progress.console.print(f"{case}: {outcome.num_identical} of {outcome.num_outputs} identical")
                    progress.advance(bar)
    return outcomes


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table(title="Tokens compared with the target's own")
    for column in ("drafter", "K", "concurrency", "temperature", "identical", "near-ties", "defects", "acceptance"):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    for o in outcomes:
        rate = "" if o.acceptance_rate is None else f"{o.acceptance_rate:.2f}"
        cells = (o.case.drafter, o.case.num_draft_tokens, o.case.concurrency, o.case.temperature)
        counts = (f"{o.num_identical}/{o.num_outputs}", o.num_near_ties, o.num_defects, rate)
        table.add_row(*map(str, (*cells, *counts)), style="red" if o.num_defects else "")
    console.print(table)


@click.command(context_settings={"show_default": True})
@click.option("--model", default="sample", help="The target: `sample`, a Hugging Face id, a directory or a GGUF file.")
@click.option("--prompts", type=click.Path(exists=True, path_type=Path), default=PROMPTS, help="Prompt file (JSONL).")
@click.option("--limit", default=24, help="Prompts, spread over the categories.")
@click.option("--max-tokens", default=128, help="Tokens of each output.")
@click.option("--drafters", default="ngram,model", help="Drafters, chains as suffix+model.")
@click.option("--draft", default="", help="Of drafters that need a model, say sample-draft; empty: a small random one.")
@click.option("--num-draft-tokens", "lengths", default="1,4,8", help="Draft lengths.")
@click.option("--concurrency", default=8, help="Requests at once.")
@click.option("--temperatures", default="0", help="0 is greedy; others are coupled.")
@click.option("--dtype", default="float32", help="Other dtypes report a divergence and do not judge it.")
@click.option("--threads", default=os.cpu_count() or 1, help="Threads of the cluster and the reference.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the outcome here.")
def main(
    model: str,
    prompts: Path,
    limit: int,
    max_tokens: int,
    drafters: str,
    draft: str,
    lengths: str,
    concurrency: int,
    temperatures: str,
    dtype: str,
    threads: int,
    json_file: Path | None,
) -> None:
    """Compare the service's tokens with the target's own; fail if more than 1 % differ, or any where no tie was."""
    directory = Path(prepare_model(model).directory)
    chains = [chain.replace("+", ",") for chain in drafters.split(",")]
    cases = matrix(chains, map(int, lengths.split(",")), concurrency, map(float, temperatures.split(",")))
    outcomes = check(directory, cases, read_prompts(prompts, limit), max_tokens, threads, dtype, draft)
    console = Console()
    show(outcomes, console)
    outputs = sum(o.num_outputs for o in outcomes)
    ties, defects = sum(o.num_near_ties for o in outcomes), sum(o.num_defects for o in outcomes)
    share = (ties + defects) / outputs
    console.print(f"{outputs} outputs, {ties} near-ties, {defects} other differences: {share:.2%} differ ({dtype})")
    if json_file:
        command = (
            f"python -m tests.exact.check_exact --prompts {prompts.name} --limit {limit} --max-tokens {max_tokens} "
            f"--drafters {drafters} --draft '{draft}' --num-draft-tokens {lengths} --concurrency {concurrency} "
            f"--temperatures {temperatures} --dtype {dtype}"
        )
        measured = asdict(environment([])) | {"command": command}
        report = {
            "environment": measured,
            "dtype": dtype,
            "num_outputs": outputs,
            "num_near_ties": ties,
            "num_defects": defects,
            "cases": [asdict(o) for o in outcomes],
        }
        json_file.write_text(json.dumps(report, indent=1, default=str) + "\n")
    if dtype == "float32" and (defects or share > MAX_DIFFERING_SHARE):
        sys.exit(1)


if __name__ == "__main__":
    main()
