"""`outrider up`: the three services and their session store on this machine, until a signal.

Owns: keeping them, and noticing when one ends. Must not know: how processes are started and stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from typing import Any

import click

from services.cli.cluster import Cluster, ClusterSpec, PoolSpec
from services.cli.failure import CommandFailed
from services.cli.options import NUM_DRAFT_TOKENS, cluster_options, json_option
from services.cli.terminal import Stages, notices, results
from services.common.drafters import parse_chain
from services.common.errors import ConfigError

_WATCH_S = 0.2
_PORT = click.IntRange(0, 65_535)


class DraftPool(click.ParamType[PoolSpec]):
    """NAME=DRAFTER[:MODEL]."""

    name = "pool"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PoolSpec:
        if isinstance(value, PoolSpec):
            return value
        name, has_name, rest = str(value).partition("=")
        drafter, _, model = rest.partition(":")
        if not has_name or not re.fullmatch(r"[\w.-]+", name):
            self.fail(f"{value!r} is no pool such as fast=suffix or big=model:DIRECTORY", param, ctx)
        try:
            parse_chain(drafter)
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        return PoolSpec(name, drafter, model)


@click.command()
@cluster_options
@click.option("--coordinator-port", type=_PORT, default=50051, show_default=True, help="0 takes a free one.")
@click.option(
    "--draft-port", type=_PORT, default=50052, show_default=True, help="Of the first one; 0 takes a free one."
)
@click.option(
    "--target-port", type=_PORT, default=50053, show_default=True, help="Of the first one; 0 takes a free one."
)
@click.option(
    "--draft-pool",
    "named_pools",
    type=DraftPool(),
    multiple=True,
    help="A pool of drafts by name, as NAME=DRAFTER or NAME=DRAFTER:MODEL, in place of --drafter; for several, repeat "
    "it. Requests may name one (`outrider generate --draft NAME`), the others are spread over them.",
)
@click.option(
    "--num-draft-tokens",
    type=NUM_DRAFT_TOKENS,
    help="Draft tokens a round where a request leaves it open.  [default: auto, as many as pay]",
)
@json_option
def up(
    spec: ClusterSpec,
    coordinator_port: int,
    draft_port: int,
    target_port: int,
    named_pools: tuple[PoolSpec, ...],
    num_draft_tokens: int | None,
    as_json: bool,
) -> None:
    """Start coordinator, draft, target and a bundled Redis-compatible server here, on loopback, and keep them running.

    Without options: the sample model (downloaded once) in float32 on CPU, drafted for by a
    suffix tree and the sample draft. Ctrl-C or SIGTERM
    stops everything. With --json one line with the addresses is printed once all are ready.
    """
    if len({pool.name for pool in named_pools}) < len(named_pools):
        raise click.UsageError("--draft-pool: two pools have the same name")
    spec = dataclasses.replace(
        spec,
        coordinator_port=coordinator_port,
        draft_port=draft_port,
        target_port=target_port,
        named_pools=tuple(pool._replace(draft=pool.draft or spec.draft) for pool in named_pools),
        num_draft_tokens=num_draft_tokens,
    )
    console = notices()
    with Stages(console) as stages, Cluster(spec, stages.show) as cluster:
        stages.stop()
        names = ("coordinator", *cluster.drafts, *cluster.targets)
        addresses = {name: cluster.address_of(name) for name in names}
        metrics = {name: cluster.metrics_url_of(name) for name in names}
        if as_json:
            click.echo(json.dumps({"event": "ready", "pid": os.getpid(), **addresses, "metrics": metrics}))
        else:
            _print_welcome(addresses, metrics)
        while (ended := cluster.ended()) is None:
            time.sleep(_WATCH_S)
        raise CommandFailed(f"the {ended.name} ended by itself; everything is stopped", detail=ended.last_lines())


def _print_welcome(addresses: dict[str, str], metrics: dict[str, str]) -> None:
    console = results()
    for service, address in addresses.items():
        console.print(f"[bold]{service:<12}[/bold] {address}   [dim]{metrics[service]}[/dim]")
    flag = "" if addresses["coordinator"].endswith(":50051") else f" --address {addresses['coordinator']}"
    console.print(f'\nTry:  outrider generate{flag} "Why is the sky blue?"\n      outrider top{flag}\nStop: Ctrl-C')
