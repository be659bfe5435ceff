"""`outrider keys`: the API keys that coordinators accept.

Owns: how the file is changed and shown. Must not know: how a key is made or checked (services.common.api_keys).
A key is printed once, when it is made; the file holds only its hash.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

import click
from rich.table import Table

from services.cli.failure import CommandFailed
from services.cli.options import json_option
from services.cli.terminal import notices, results, whole
from services.common.api_keys import (
    KeyOwner,
    KeyRing,
    check_limits,
    check_name,
    new_key,
    read_ring,
    write_ring,
)
from services.common.errors import ConfigError

_file_option = click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    envvar="OUTRIDER_API_KEYS_FILE",
    show_envvar=True,
    help="The keys file, as coordinators get it by --api-keys-file.",
)


@click.group()
def keys() -> None:
    """Manage the API keys that coordinators accept. Coordinators read a changed file by themselves."""


@keys.command("add")
@click.argument("name")
@_file_option
@click.option("--requests-per-s", type=float, help="Most requests a second.  [default: no limit]")
@click.option("--tokens-per-min", type=int, help="Most tokens a minute, of prompts and answers.  [default: no limit]")
@click.option("--max-sessions", type=int, help="Most sessions that generate at once.  [default: no limit]")
@json_option
def add(
    name: str,
    path: Path,
    requests_per_s: float | None,
    tokens_per_min: int | None,
    max_sessions: int | None,
    as_json: bool,
) -> None:
    """Make a key for NAME and print it, this once.

    For a NAME that has keys this is one more, with the same sessions and limits: give it out, then remove the old one
    by its id. Limits that are given replace NAME's; 0 lifts one. They hold for all keys of NAME, at all coordinators,
    together.
    """
    with _usage_errors():
        check_name(name)
        ring = read_ring(path) if path.exists() else KeyRing()
        owner = ring.owners.get(name, KeyOwner(name))
        given = {"requests_per_s": requests_per_s, "tokens_per_min": tokens_per_min, "max_sessions": max_sessions}
        changed = {field: value for field, value in given.items() if value is not None}
        limits = dataclasses.replace(owner.limits, **changed)  # type: ignore[arg-type]  # by name
        check_limits(limits)
        key, stored = new_key(datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        owner = KeyOwner(name, limits, (*owner.keys, stored))
        write_ring(path, KeyRing((ring.owners | {name: owner}).values()))
    if as_json:
        click.echo(json.dumps({"name": name, "key_id": stored.key_id, "key": key}))
        return
    click.echo(key)
    notices().print(f"[dim]key {stored.key_id} of {name}; it is not shown again[/dim]")


@keys.command("list")
@_file_option
@json_option
def list_keys(path: Path, as_json: bool) -> None:
    """Show names, key ids and limits; never a key."""
    with _usage_errors():
        owners = read_ring(path).owners.values()
    if as_json:
        click.echo(json.dumps([_as_object(owner) for owner in owners]))
        return
    table = Table(whole("name"), whole("key id"), whole("made"), "requests/s", "tokens/min", "sessions")
    for owner in owners:
        limits = [_shown(value) for value in dataclasses.astuple(owner.limits)]
        for key in owner.keys:
            table.add_row(owner.name, key.key_id, key.created, *limits)
    results().print(table)


@keys.command("remove")
@click.argument("name_or_id")
@_file_option
def remove(name_or_id: str, path: Path) -> None:
    """Remove a key by its id, or all keys of a name. Coordinators refuse them from their next request on."""
    with _usage_errors():
        ring = read_ring(path)
        kept = []
        for owner in ring.owners.values():
            left = tuple(key for key in owner.keys if name_or_id not in (owner.name, key.key_id))
            if left:
                kept.append(dataclasses.replace(owner, keys=left))
        num_removed = sum(len(o.keys) for o in ring.owners.values()) - sum(len(owner.keys) for owner in kept)
        if not num_removed:
            raise CommandFailed(f"{path} has no name and no key id {name_or_id}")
        write_ring(path, KeyRing(kept))
    notices().print(f"[dim]{num_removed} removed[/dim]")


class _usage_errors:
    """What is wrong with a name, a limit or a file ends the command in one line."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ConfigError | OSError):
            raise CommandFailed(str(error)) from None


def _as_object(owner: KeyOwner) -> dict[str, object]:
    """Without the hashes: nobody needs them but coordinators."""
    ids = [{"key_id": key.key_id, "created": key.created} for key in owner.keys]
    return {"name": owner.name, **dataclasses.asdict(owner.limits), "keys": ids}


def _shown(limit: float) -> str:
    return f"{limit:g}" if limit else "no limit"
