"""`outrider demo`: three prompts on a cluster of its own, streamed, plain and speculative, and what came of it.

Owns: which prompts, and how they are shown. Must not know: how processes run, how text is coloured.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

from services.cli.bench.show import number
from services.cli.cluster import Cluster, ClusterSpec
from services.cli.failure import CommandFailed, describe
from services.cli.options import cluster_options
from services.cli.prompts import Conversation, load_prompts
from services.cli.terminal import is_coloured, legend, notices, results, write_text
from services.client import Chat, GenerateOptions, OutriderClient, Result
from services.common.errors import OutriderError

KINDS = {"chat": "qa", "summarise a text": "summarization", "edit code": "coding"}
"""What each prompt stands for, and the category of the prompt file whose first entry it is."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, decoded both ways; times in seconds from sending to the last token."""

    kind: str
    plain: Result
    plain_s: float
    speculative: Result
    speculative_s: float

    @property
    def identical(self) -> bool:
        return self.plain.token_ids == self.speculative.token_ids


@click.command()
@click.option("--max-tokens", type=click.IntRange(min=1), default=96, show_default=True, help="Most tokens a prompt.")
@cluster_options
def demo(max_tokens: int, spec: ClusterSpec) -> None:
    """Start everything here, send three prompts, with and without speculation, and compare.

    The first run downloads and converts the sample model. Accepted draft tokens are green, the target's own are yellow.
    """
    console = notices()
    started = time.monotonic()
    with console.status("starting") as status, Cluster(spec, status.update) as cluster:
        status.stop()
        console.print(f"[dim]coordinator, draft and target are ready after {time.monotonic() - started:.1f} s[/dim]")
        try:
            comparisons = asyncio.run(_compare_all(cluster.address, max_tokens))
        except OutriderError as error:
            raise CommandFailed(describe(error, cluster.address)) from None
        model = comparisons[0].plain.model
    results().print(_table(comparisons, f"{model} in {spec.dtype}, drafter {spec.drafter}"))


async def _compare_all(address: str, max_tokens: int) -> list[Comparison]:
    conversations = load_prompts()
    options = GenerateOptions(temperature=0.0, max_tokens=max_tokens)
    plain_options = GenerateOptions(temperature=0.0, max_tokens=max_tokens, num_draft_tokens=0)
    console = results()
    comparisons = []
    async with OutriderClient(address) as client:
        for kind, category in KINDS.items():
            conversation = next(c for c in conversations if c.category == category)
            _print_prompt(console, kind, conversation)
            speculative, speculative_s = await _stream(client, conversation, options)
            with notices().status("the same without speculation"):
                plain, plain_s = await _timed(client, conversation, plain_options)
            comparisons.append(Comparison(kind, plain, plain_s, speculative, speculative_s))
    return comparisons


def _print_prompt(console: Console, kind: str, conversation: Conversation) -> None:
    console.rule(kind, align="left", characters="-")
    first_line, _, rest = conversation.turns[0].partition("\n")
    console.print(first_line + (f" [... {len(rest.split())} words]" if rest else ""), style="dim", markup=False)
    if is_coloured():
        click.echo(legend(), color=True)


async def _stream(client: OutriderClient, conversation: Conversation, options: GenerateOptions) -> tuple[Result, float]:
    coloured = is_coloured()
    started = time.perf_counter()
    generation = client.generate(Chat.of(conversation.turns[0]), options)
    async with contextlib.aclosing(generation):
        async for chunk in generation:
            write_text(chunk, coloured=coloured)
    click.echo("\n")
    return generation.result, time.perf_counter() - started


async def _timed(client: OutriderClient, conversation: Conversation, options: GenerateOptions) -> tuple[Result, float]:
    started = time.perf_counter()
    result = await client.complete(Chat.of(conversation.turns[0]), options)
    return result, time.perf_counter() - started


def _table(comparisons: Sequence[Comparison], title: str) -> Table:
    columns = ("prompt", "tokens", "plain tok/s", "speculative tok/s", "speed-up", "acceptance rate", "mean length")
    table = Table(*columns, "identical", title=title, title_justify="left")
    for c in comparisons:
        statistics = c.speculative.statistics
        table.add_row(
            c.kind,
            str(len(c.speculative.tokens)),
            number(len(c.plain.tokens) / c.plain_s),
            number(len(c.speculative.tokens) / c.speculative_s),
            number(_speedup([c])),
            number(statistics.acceptance_rate),
            number(statistics.mean_acceptance_length),
            "yes" if c.identical else "no",
        )
    drafted = sum(c.speculative.statistics.num_draft_tokens for c in comparisons)
    accepted = sum(c.speculative.statistics.num_accepted_tokens for c in comparisons)
    drafts = sum(c.speculative.statistics.num_drafts for c in comparisons)
    table.add_section()
    table.add_row(
        "all",
        str(sum(len(c.speculative.tokens) for c in comparisons)),
        number(sum(len(c.plain.tokens) for c in comparisons) / sum(c.plain_s for c in comparisons)),
        number(sum(len(c.speculative.tokens) for c in comparisons) / sum(c.speculative_s for c in comparisons)),
        number(_speedup(comparisons)),
        number(accepted / drafted if drafted else None),
        number(1 + accepted / drafts if drafts else None),
        "yes" if all(c.identical for c in comparisons) else "no",
    )
    return table


def _speedup(comparisons: Sequence[Comparison]) -> float:
    """Of tokens per second, prefill included."""
    plain = sum(len(c.plain.tokens) for c in comparisons) / sum(c.plain_s for c in comparisons)
    speculative = sum(len(c.speculative.tokens) for c in comparisons) / sum(c.speculative_s for c in comparisons)
    return speculative / plain
