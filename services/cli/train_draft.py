"""`outrider train-draft`: trains a draft for a target model, in a process of its own.

Owns: replacing this process by the training's. Must not know: its flags, which pass through, --help included.
"""

from __future__ import annotations

import os
import sys

import click


@click.command(
    "train-draft", context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS]")
def train_draft(arguments: tuple[str, ...]) -> None:
    """Train a small draft for a target model, without any data set.

    The target writes instructions and answers; the draft learns its distributions. Interrupt it at any time and run it
    again to go on. `outrider train-draft --help` lists the options.
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "services.engine.training", *arguments])  # noqa: S606
