"""`outrider demo`: three prompts on a cluster of its own, streamed, plain and speculative, and what came of it.

Each of them is cold in both modes: a cache salt of its own keeps it from the prefix that the other mode left cached.

Owns: which prompts, and how they are shown. Must not know: how processes run, how text is coloured.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

from services.cli.bench.show import number
from services.cli.cluster import SIMULATED, Cluster, ClusterSpec
from services.cli.failure import CommandFailed, describe
from services.cli.options import cluster_options
from services.cli.prompts import Conversation, load_prompts
from services.cli.terminal import Stages, is_coloured, legend, notices, results, write_text
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
    with Stages(console) as stages, Cluster(spec, stages.show) as cluster:
        stages.stop()
        console.print(f"[dim]coordinator, draft and target are ready after {time.monotonic() - started:.1f} s[/dim]")
        try:
            comparisons = asyncio.run(_compare_all(cluster.address, max_tokens))
        except OutriderError as error:
            raise CommandFailed(describe(error, cluster.address)) from None
        model = comparisons[0].plain.model
    results().print(_table(comparisons, f"{_shown(model, spec)}, drafter {spec.drafter}"))


def _shown(model: str, spec: ClusterSpec) -> str:
    return model if spec.target == SIMULATED else f"{model} in {spec.dtype}"


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
            speculative, speculative_s = await _stream(client, conversation, _cold(options))
            with notices().status("the same without speculation"):
                plain, plain_s = await _timed(client, conversation, _cold(plain_options))
            comparisons.append(Comparison(kind, plain, plain_s, speculative, speculative_s))
    return comparisons


def _cold(options: GenerateOptions) -> GenerateOptions:
    return dataclasses.replace(options, cache_salt=str(uuid.uuid4()))


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
    """One column a prompt and one for all, so that it fits 80 characters."""
    groups = [*([c] for c in comparisons), list(comparisons)]
    table = Table("", *(c.kind for c in comparisons), "all", title=title, title_justify="left")
    table.add_row("tokens", *(str(sum(len(c.speculative.tokens) for c in group)) for group in groups))
    table.add_row("plain tokens/s", *(number(_plain_rate(group)) for group in groups))
    table.add_row("speculative tokens/s", *(number(_speculative_rate(group)) for group in groups))
    table.add_row("speed-up", *(number(_speculative_rate(group) / _plain_rate(group)) for group in groups))
    table.add_row("acceptance rate", *(number(_acceptance(group)[0]) for group in groups))
    table.add_row("mean acceptance length", *(number(_acceptance(group)[1]) for group in groups))
    table.add_row("identical output", *("yes" if all(c.identical for c in group) else "no" for group in groups))
    return table


def _plain_rate(group: Sequence[Comparison]) -> float:
    """Tokens per second, the prefill of a cold prompt included."""
    return sum(len(c.plain.tokens) for c in group) / sum(c.plain_s for c in group)


def _speculative_rate(group: Sequence[Comparison]) -> float:
    return sum(len(c.speculative.tokens) for c in group) / sum(c.speculative_s for c in group)


def _acceptance(group: Sequence[Comparison]) -> tuple[float | None, float | None]:
    """Acceptance rate and mean acceptance length; None where nothing was drafted."""
    statistics = [c.speculative.statistics for c in group]
    num_drafts = sum(s.num_drafts for s in statistics)
    num_drafted = sum(s.num_draft_tokens for s in statistics)
    num_accepted = sum(s.num_accepted_tokens for s in statistics)
    rate = num_accepted / num_drafted if num_drafted else None
    return rate, 1 + num_accepted / num_drafts if num_drafts else None
