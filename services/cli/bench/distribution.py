"""`outrider bench --check-distribution`: short sampled continuations of one prompt, plain and speculative, compared.

Owns: drawing them from a coordinator, and showing the verdict. Must not know: how the sets are compared.

Every continuation has a seed of its own, so that the two sets are independent under every kind of verification. The
first token comes from the target alone; speculation decides from the second on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from services.cli.bench.homogeneity import LEAST_P, DistributionReport, compare
from services.cli.bench.load import LoadPlan
from services.cli.bench.sample import Mode
from services.cli.prompts import Conversation
from services.cli.terminal import progress_bar
from services.client import Access, Chat, OutriderClient, Result
from services.common.values import DEFAULT_NUM_DRAFT_TOKENS

CONTINUATION_LEN = 8
DEFAULT_NUM_SAMPLES = 1000
DEFAULT_CONCURRENCY = 16
_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class DistributionCheck:
    """The comparison, and the draft tokens that the speculative continuations verified: without any it says nothing."""

    report: DistributionReport
    num_draft_tokens: int
    num_accepted_tokens: int

    @property
    def passed(self) -> bool:
        return self.report.equal and self.num_draft_tokens > 0


async def draw_and_compare(
    address: str,
    conversation: Conversation,
    plan: LoadPlan,
    num_samples: int,
    console: Console,
    access: Access | None = None,
) -> DistributionCheck:
    """Draws `num_samples` continuations in each mode, in turns. Raises OutriderError where a request fails.

    Drafts a fixed number of tokens where none is given: few tokens are over before the adaptive length has learnt.
    """
    drawn: dict[Mode, list[Result]] = {mode: [] for mode in Mode}
    text = conversation.turns[0]
    prompt = text if plan.raw else Chat.of(text)
    waiting = _requests(plan.seed, num_samples)
    async with OutriderClient(address, access=access) as client:
        with progress_bar(console) as progress:
            task = progress.add_task("sampling", total=2 * num_samples)

            async def place() -> None:
                for mode, seed in waiting:
                    given = plan.options.num_draft_tokens
                    speculative = DEFAULT_NUM_DRAFT_TOKENS if given is None else given
                    num_draft_tokens = 0 if mode is Mode.PLAIN else speculative
                    options = replace(plan.options, seed=seed, num_draft_tokens=num_draft_tokens)
                    drawn[mode].append(await client.complete(prompt, options))
                    progress.advance(task)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(plan.concurrency):
                        group.create_task(place())
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
    plain, speculative = ([result.token_ids for result in drawn[mode]] for mode in (Mode.PLAIN, Mode.SPECULATIVE))
    statistics = [result.statistics for result in drawn[Mode.SPECULATIVE]]
    return DistributionCheck(
        compare(plain, speculative),
        sum(s.num_draft_tokens for s in statistics),
        sum(s.num_accepted_tokens for s in statistics),
    )


def _requests(first_seed: int, num_samples: int) -> Iterator[tuple[Mode, int]]:
    for index in range(num_samples):
        for offset, mode in enumerate(Mode):
            yield mode, (first_seed + 2 * index + offset) & _SEED_MASK


def print_distribution(check: DistributionCheck, console: Console) -> None:
    table = Table("", "outcomes", "cells", "chi-square", "p", title="plain against speculative", title_justify="left")
    for test in check.report.tests:
        table.add_row(test.name, str(test.num_outcomes), str(test.num_cells), f"{test.chi_square:.2f}", f"{test.p:.3g}")
    console.print(table)
    console.print(verdict(check), soft_wrap=True)


def verdict(check: DistributionCheck) -> str:
    """One sentence."""
    if not check.num_draft_tokens:
        return "NOTHING WAS DRAFTED: two sets of plain continuations say nothing about speculation; try --drafter model"
    report = check.report
    found = "no difference found" if report.equal else "THE DISTRIBUTIONS DIFFER"
    return (
        f"{found}: p = {report.p:.3g} over {len(report.tests)} tests, {report.num_plain} plain and "
        f"{report.num_speculative} speculative continuations ({check.num_accepted_tokens} of "
        f"{check.num_draft_tokens} draft tokens accepted); below {LEAST_P:g} counts as a difference"
    )
