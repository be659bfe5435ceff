"""Configuration: one frozen dataclass a service, default < environment (`OUTRIDER_*`) < flag.

Owns: reading and checking settings, and generating command-line flags from the dataclass fields.
Must not know: what the settings mean. A field is declared with `setting(default, "sentence")`.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from services.common.errors import ConfigError

PREFIX = "OUTRIDER_"
C = TypeVar("C")


def setting(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with the sentence that `--help` prints."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where converted models live: OUTRIDER_CACHE_DIR, else $XDG_CACHE_HOME/outrider, else ~/.cache/outrider."""
    if explicit := environ.get(PREFIX + "CACHE_DIR"):
        return Path(explicit)
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider"


_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def _parse(name: str, kind: type, choices: tuple[str, ...], text: str) -> Any:
    try:
        if kind is bool:
            if text.lower() not in _TRUE | _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        value = kind(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a valid {kind.__name__}") from None
    if choices and value not in choices:
        raise ConfigError(f"{name}: {text!r} is not one of {', '.join(choices)}")
    return value


def _fields(config: type) -> list[tuple[dataclasses.Field[Any], type]]:
    hints = typing.get_type_hints(config)
    return [(f, hints[f.name]) for f in dataclasses.fields(config)]


def load(config: type[C], flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> C:
    """Builds `config` from its defaults, `environ` and `flags` (None = flag not given).

    Raises ConfigError with the setting's name for a value that cannot be parsed.
    """
    values: dict[str, Any] = {}
    for f, kind in _fields(config):
        name, choices = PREFIX + f.name.upper(), f.metadata.get("choices", ())
        if (text := environ.get(name)) is not None:
            values[f.name] = _parse(name, kind, choices, text)
        if flags and (flag := flags.get(f.name)) is not None:
            values[f.name] = flag
    return config(**values)


def reject_unknown(*configs: type, known: tuple[str, ...] = (), environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError for an `OUTRIDER_*` variable that none of `configs` has: most likely a misspelling."""
    names = {PREFIX + f.name.upper() for c in configs for f in dataclasses.fields(c)} | {PREFIX + k for k in known}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in names:
            raise ConfigError(f"{name}: no such setting")


def flags(config: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: adds a click option for every field; unset options arrive as None."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for f, kind in reversed(_fields(config)):
            option, choices = "--" + f.name.replace("_", "-"), f.metadata.get("choices", ())
            shown = f"{f.metadata.get('help', '')}  [env {PREFIX}{f.name.upper()}; default {f.default!r}]"
            if kind is bool:
                command = click.option(f"{option}/--no-{option[2:]}", f.name, default=None, help=shown)(command)
            else:
                typ = click.Choice(choices) if choices else kind
                command = click.option(option, f.name, type=typ, default=None, help=shown)(command)
        return command

    return decorate
