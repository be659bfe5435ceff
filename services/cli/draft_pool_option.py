"""The option --draft-pool: pools of drafts by name.

Owns: how a pool is written, and what pools are refused. Must not know: what a command does with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from services.cli.cluster import PoolSpec
from services.common.drafters import parse_chain
from services.common.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


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


def draft_pool_option(help: str) -> Callable[[F], F]:
    """Adds it; the command gets the pools, of different names, as `named_pools`."""
    return click.option(
        "--draft-pool", "named_pools", type=DraftPool(), multiple=True, callback=_of_different_names, help=help
    )


def with_draft(pools: tuple[PoolSpec, ...], draft: str) -> tuple[PoolSpec, ...]:
    """Those that name no model get `draft`."""
    return tuple(pool._replace(draft=pool.draft or draft) for pool in pools)


def _of_different_names(
    context: click.Context, parameter: click.Parameter, pools: tuple[PoolSpec, ...]
) -> tuple[PoolSpec, ...]:
    if len({pool.name for pool in pools}) < len(pools):
        raise click.BadParameter("two pools have the same name", context, parameter)
    return pools
