"""The command line that both kinds of worker share.

Owns: flags from the configuration, and the thread settings that must be in the environment before torch is loaded.
Must not know: what the worker serves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from services.common.config import flags, load, reject_unknown
from services.common.errors import ConfigError, ModelUnsupported, WorkerFailed
from services.common.service import setup_logging
from services.common.worker_config import WorkerConfig

C = TypeVar("C", bound=WorkerConfig)
SHARED_VARIABLES = ("CACHE_DIR", "ADDRESS", "API_KEY", "API_KEY_FILE")
"""OUTRIDER_* variables that are no field of a service's configuration."""


def set_threads(num_threads: int) -> None:
    """Sets OpenMP's threads. Idle, they sleep: a spinning thread takes a core from the worker beside it.

    But only after the fraction of a millisecond that lies between two products of a step: waking them for each of its
    hundreds of products made a step half as long again.
    """
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def worker_command(kind: type[C], name: str, help: str, serve: Callable[[C], None]) -> click.Command:
    """A command with a flag for every field of `kind`. Exits with 2 for a bad setting, with 1 for a bad model or where
    the worker cannot go on."""

    @click.command(name=name, help=help)
    @flags(kind)
    def command(**given: Any) -> None:
        try:
            reject_unknown(kind, known=SHARED_VARIABLES)
            config = load(kind, given)
            setup_logging(config.log_level, config.log_format)
            set_threads(config.num_threads)
            serve(config)
        except ConfigError as error:
            click.echo(f"{name}: {error}", err=True)
            sys.exit(2)
        except (ModelUnsupported, WorkerFailed, OSError) as error:
            click.echo(f"{name}: {error}", err=True)
            sys.exit(1)

    return command
