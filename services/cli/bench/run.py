"""Runs a load against a coordinator, with progress, and gathers the blocks and the coordinator's CPU time.

Owns: that run. Must not know: options, tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console

from services.cli.bench.load import Block, Load, LoadPlan
from services.cli.bench.machine import cpu_time_ms
from services.cli.bench.sample import Mode
from services.cli.prompts import Conversation
from services.cli.terminal import progress_bar
from services.client import Access, OutriderClient


class RunOutcome(NamedTuple):
    """All blocks, and the coordinator's CPU time in each mode's; None where its process is not ours."""

    blocks: tuple[Block, ...]
    cpu_ms: dict[Mode, float] | None


async def run_load(
    address: str,
    conversations: Sequence[Conversation],
    plan: LoadPlan,
    console: Console,
    coordinator_pid: int | None = None,
    *,
    title: str = "measuring",
    access: Access | None = None,
) -> RunOutcome:
    """Raises OutriderError if the warm-up fails; failures after it are counted, not raised."""
    blocks: list[Block] = []
    cpu_ms = dict.fromkeys(Mode, 0.0)
    known = coordinator_pid is not None
    async with OutriderClient(address, access=access) as client:
        with progress_bar(console) as progress:
            task = progress.add_task("warming up", total=len(conversations) * len(plan.modes))
            load = Load(client, plan, on_done=lambda: progress.advance(task))
            await load.warm_up(conversations)
            progress.update(task, description=title)
            before = cpu_time_ms(coordinator_pid) if coordinator_pid is not None else None
            async for block in load.run(conversations):
                blocks.append(block)
                after = cpu_time_ms(coordinator_pid) if coordinator_pid is not None else None
                known = known and before is not None and after is not None
                cpu_ms[block.mode] += (after or 0.0) - (before or 0.0)
                before = after
    return RunOutcome(tuple(blocks), cpu_ms if known else None)
