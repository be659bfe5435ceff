"""`outrider serve`: one service in the foreground, as a container runs it.

Owns: replacing this process by the service's. Must not know: the services' flags, which pass through, --help included.
"""

from __future__ import annotations

import os
import sys

import click

_PASS_THROUGH = {"ignore_unknown_options": True, "help_option_names": []}


@click.command(context_settings=_PASS_THROUGH, add_help_option=False, options_metavar="")
@click.argument("service", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
@click.pass_context
def serve(context: click.Context, service: str | None, arguments: tuple[str, ...]) -> None:
    """Run one service: draft, target or coordinator.

    Settings come from its options and from OUTRIDER_* variables; `outrider serve SERVICE --help` lists them. One line
    of JSON on standard output tells when it is ready and on which port. SIGTERM drains it.
    """
    if service in (None, "-h", "--help"):
        click.echo(context.get_help())
        return
    if service not in ("draft", "target", "coordinator"):
        raise click.UsageError(f"{service!r} is not one of draft, target, coordinator", context)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", f"services.{service}", *arguments])  # noqa: S606
