"""`outrider models` and `outrider sessions`: what a running cluster serves and remembers.

Owns: how that is shown. Must not know: how it is fetched.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click
from rich.table import Table

from services.cli.failure import CommandFailed, describe
from services.cli.options import access_options, address_option, json_option
from services.cli.terminal import results, whole
from services.client import Access, OutriderClient, ServedModel, SessionRecord
from services.common.errors import OutriderError

T = TypeVar("T")


def _ask(address: str, access: Access, question: Callable[[OutriderClient], Awaitable[T]]) -> T:
    async def ask() -> T:
        async with OutriderClient(address, access=access) as client:
            return await question(client)

    try:
        return asyncio.run(ask())
    except OutriderError as error:
        raise CommandFailed(describe(error, address)) from None


@click.command()
@address_option()
@access_options
@json_option
def models(address: str, access: Access, as_json: bool) -> None:
    """List the models that requests may name."""
    served = _ask(address, access, lambda client: client.list_models())
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(model) for model in served]))
        return
    table = Table(whole("model"), whole("drafter"), "vocabulary", "longest sequence", "ready")
    for model in served:
        ready = "yes" if model.ready else "no"
        table.add_row(
            model.name,
            " ".join(part for part in (model.drafter, model.draft_model) if part) or "none",
            str(model.vocab_size),
            str(model.max_sequence_len),
            ready,
        )
    results().print(table)
    for model in served:
        if len(model.drafts) > 1:
            results().print(_draft_table(model))


def _draft_table(model: ServedModel) -> Table:
    table = Table(whole("draft of " + model.name), "weight", whole("drafter"), "ready", "drafted", "accepted", "rate")
    for draft in model.drafts:
        rate = draft.acceptance_rate
        table.add_row(
            draft.name,
            f"{draft.weight:g}",
            " ".join(part for part in (draft.drafter, draft.draft_model) if part) or "none",
            "yes" if draft.ready else "no",
            str(draft.num_draft_tokens),
            str(draft.num_accepted_tokens),
            "" if rate is None else f"{rate:.3f}",
        )
    return table


@click.group()
def sessions() -> None:
    """Look at a session, or end it."""


@sessions.command("get")
@click.argument("session_id")
@address_option()
@access_options
@json_option
def get(session_id: str, address: str, access: Access, as_json: bool) -> None:
    """Show a session's record: its tokens and how its last generation ended."""
    record = _ask(address, access, lambda client: client.get_session(session_id))
    if as_json:
        finish = record.finish_reason.value if record.finish_reason else None
        click.echo(json.dumps(dataclasses.asdict(record) | {"finish_reason": finish}))
        return
    _print_record(record)


@sessions.command("close")
@click.argument("session_id")
@address_option()
@access_options
def close(session_id: str, address: str, access: Access) -> None:
    """End a session: stop its generation and free what it holds."""
    _ask(address, access, lambda client: client.close_session(session_id))


def _print_record(record: SessionRecord) -> None:
    table = Table("", whole(""), show_header=False)
    state = "running" if record.running else record.finish_reason.value if record.finish_reason else "cut off"
    table.add_row("session", record.session_id)
    table.add_row("last request", record.request_id)
    table.add_row("model", record.model)
    table.add_row("tokens", f"{len(record.token_ids)}, of them {record.prompt_len} the last prompt's")
    table.add_row("state", state)
    table.add_row("expires in", f"{record.expires_in_s} s")
    results().print(table)
