"""`outrider top`: what a running cluster does, drawn anew every second.

Owns: looking again and again, and when that ends. Must not know: what the figures mean, how they are drawn.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections import deque
from collections.abc import AsyncIterator

import click
from rich.console import Console
from rich.live import Live

from services.cli.failure import CommandFailed, describe
from services.cli.options import access_options, address_option
from services.cli.terminal import results
from services.cli.top.rates import ClusterView, Look, view_of
from services.cli.top.view import render
from services.client import Access, ClusterStatus, OutriderClient
from services.common.errors import OutriderError

_HISTORY_LEN = 60


@click.command()
@address_option(help="Coordinator to ask; several, separated by commas, are shown together.")
@access_options
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Look twice, show what happened in between, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, one line for each interval.")
def top(address: str, access: Access, interval: float, once: bool, as_json: bool) -> None:
    """Watch a cluster: requests, acceptance and tokens/s, and each worker's batch, queue, steps and blocks.

    Everything comes from the coordinators, which ask their workers. Rates are those of the last interval; prefix hits
    are since the worker's start. Ctrl-C ends it.
    """
    addresses = tuple(part.strip() for part in address.split(",") if part.strip())
    if not addresses:
        raise click.UsageError("--address names no coordinator")
    try:
        asyncio.run(_watch(addresses, access, interval, once, as_json))
    except KeyboardInterrupt:
        if once:
            raise


async def _watch(addresses: tuple[str, ...], access: Access, interval_s: float, once: bool, as_json: bool) -> None:
    console = results()
    history: deque[float] = deque(maxlen=_HISTORY_LEN)
    in_place = console.is_terminal and not (once or as_json)
    with Live(console=console, screen=True, auto_refresh=False) if in_place else contextlib.nullcontext() as live:
        async for view in _views(addresses, access, interval_s):
            history.append(view.tokens_per_s or 0.0)
            if live is not None:
                live.update(render(view, history, console.width), refresh=True)
            elif view.interval_s is not None:
                _print(view, history, console, as_json)
                if once:
                    return


def _print(view: ClusterView, history: deque[float], console: Console, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(view)))
    else:
        console.print(render(view, history, console.width))


async def _views(addresses: tuple[str, ...], access: Access, interval_s: float) -> AsyncIterator[ClusterView]:
    """Raises CommandFailed where no coordinator answers the first look; later ones are waited for."""
    async with contextlib.AsyncExitStack() as stack:
        clients = {a: await stack.enter_async_context(OutriderClient(a, access=access)) for a in addresses}
        before: Look | None = None
        while True:
            now = await _look(clients)
            if before is None and all(isinstance(answer, str) for answer in now.answers.values()):
                raise CommandFailed(str(next(iter(now.answers.values()))))
            yield view_of(now, before)
            before = now
            await asyncio.sleep(max(0.0, now.at_s + interval_s - time.monotonic()))


async def _look(clients: dict[str, OutriderClient]) -> Look:
    at_s = time.monotonic()
    answers = await asyncio.gather(*[_ask(address, client) for address, client in clients.items()])
    return Look(at_s, dict(zip(clients, answers, strict=True)))


async def _ask(address: str, client: OutriderClient) -> ClusterStatus | str:
    try:
        return await client.get_cluster_status()
    except OutriderError as error:
        return describe(error, address)
