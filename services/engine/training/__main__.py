"""`python -m services.engine.training`: trains a draft for a target, stage by stage, resumably.

Owns: flags, thread settings, the order of the stages. Must not know: how a stage works.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from services.common.config import flags, load
from services.common.errors import ConfigError, ModelUnsupported, OutriderError
from services.common.worker_main import set_threads
from services.engine.training.config import TrainingConfig


@click.command(name="train-draft", context_settings={"help_option_names": ["-h", "--help"]})
@flags(TrainingConfig)
def main(**given: Any) -> None:
    """Train a draft for a target model, without any data set: the target writes what the draft learns from."""
    try:
        config = load(TrainingConfig, given, environ={})
        if config.threads:
            set_threads(config.threads)
        from services.engine.training.stages import run

        run(config)
    except (ConfigError, ModelUnsupported, OutriderError, OSError) as error:
        click.echo(f"train-draft: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main()
