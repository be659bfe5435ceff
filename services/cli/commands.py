"""The list of commands, and running one of them.

Owns: what happens to errors and signals that end a command. Must not know: what the commands do.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from services.cli import failure
from services.cli.bench.command import bench
from services.cli.demo import demo
from services.cli.generate import generate
from services.cli.inspect import models, sessions
from services.cli.keys import keys
from services.cli.plan.command import plan
from services.cli.serve import serve
from services.cli.top.command import top
from services.cli.train_draft import train_draft
from services.cli.up import up
from services.common.errors import ConfigError, OutriderError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="outrider")
def cli() -> None:
    """Distributed speculative decoding: draft, target and coordinator as separate services.

    \b
    outrider demo                    see it run, from nothing
    outrider up                      start the services here and keep them running
    outrider generate "Once upon"    generate text on running services
    """


for _command in (up, serve, generate, bench, plan, train_draft, demo, models, sessions, top, keys):
    cli.add_command(_command)


def run(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command and exits: 0, 1 for a failure, 2 for wrong usage, 130 and 143 for SIGINT and SIGTERM."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays in force
            signal.signal(number, _raise_terminated)
    sys.exit(_exit_code(lambda: cli.main(arguments, prog_name="outrider", standalone_mode=False)))


def _raise_terminated(number: int, frame: object) -> None:
    raise failure.Terminated


def _exit_code(command: Callable[[], Any]) -> int:
    """The exit code of `command`; what went wrong is said in one line on standard error."""
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        error.show()
        return failure.EXIT_USAGE
    except click.ClickException as error:
        error.show()
        return failure.EXIT_FAILURE
    except (click.Abort, KeyboardInterrupt):
        return failure.EXIT_INTERRUPTED
    except failure.Terminated:
        return failure.EXIT_TERMINATED
    except failure.CommandFailed as error:
        click.echo(f"outrider: {error}", err=True)
        if error.detail:
            click.echo(error.detail, err=True)
    except OutriderError as error:
        click.echo(f"outrider: {failure.describe(error)}", err=True)
    except (ConfigError, OSError) as error:
        click.echo(f"outrider: {error}", err=True)
    return failure.EXIT_FAILURE
