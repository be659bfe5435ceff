"""`python -m services.coordinator`: the coordinator, configured by flags or OUTRIDER_* variables."""

from __future__ import annotations

import sys
from typing import Any

import click
import uvloop

from services.common.config import flags, load, reject_unknown
from services.common.errors import ConfigError, Unavailable
from services.common.service import setup_logging
from services.coordinator.config import CoordinatorConfig
from services.coordinator.server import serve

SHARED_VARIABLES = ("CACHE_DIR", "ADDRESS", "API_KEY", "API_KEY_FILE")
"""OUTRIDER_* variables that are no field of the configuration."""


@click.command(name="coordinator", help="Serve a coordinator: runs generations on draft and target workers.")
@flags(CoordinatorConfig)
def main(**given: Any) -> None:
    """Exit code 2 for a setting that stops the start, 1 for a Redis or a port that cannot be had."""
    try:
        reject_unknown(CoordinatorConfig, known=SHARED_VARIABLES)
        config = load(CoordinatorConfig, given)
        setup_logging(config.log_level, config.log_format)
        uvloop.run(serve(config))
    except ConfigError as error:
        click.echo(f"coordinator: {error}", err=True)
        sys.exit(2)
    except (Unavailable, OSError) as error:
        click.echo(f"coordinator: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
