"""Default < environment < flag; what cannot be read stops the start with the setting's name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from services.common.config import cache_dir, flags, load, reject_unknown, setting
from services.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Example:
    port: int = setting(1, "The port.")
    kind: str = setting("a", "The kind.", choices=("a", "b"))
    loud: bool = setting(False, "Whether it is loud.")
    rate: float = setting(0.5, "The rate.")


def test_flag_wins_over_environment_and_environment_over_default() -> None:
    assert load(Example, {}, {}) == Example()
    assert load(Example, {"port": None}, {"OUTRIDER_PORT": "2", "OUTRIDER_LOUD": "yes"}) == Example(port=2, loud=True)
    assert load(Example, {"port": 3}, {"OUTRIDER_PORT": "2"}) == Example(port=3)


@pytest.mark.parametrize(
    ("name", "text"),
    [("OUTRIDER_PORT", "x"), ("OUTRIDER_KIND", "c"), ("OUTRIDER_LOUD", "perhaps"), ("OUTRIDER_RATE", "")],
)
def test_an_unparsable_value_stops_the_start_with_its_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name):
        load(Example, {}, {name: text})


def test_an_unknown_variable_stops_the_start_with_its_name() -> None:
    reject_unknown(Example, environ={"OUTRIDER_PORT": "1", "OTHER": "x"})
    with pytest.raises(ConfigError, match="OUTRIDER_PROT"):
        reject_unknown(Example, environ={"OUTRIDER_PROT": "1"})


def test_every_field_becomes_a_flag_with_its_sentence() -> None:
    @click.command()
    @flags(Example)
    def command(**given: object) -> None:
        click.echo(repr(load(Example, given, {})))

    runner = CliRunner()
    assert runner.invoke(command, ["--port", "9", "--loud"]).output.strip() == repr(Example(port=9, loud=True))
    shown = runner.invoke(command, ["--help"]).output
    assert "The kind." in shown
    assert "OUTRIDER_KIND" in shown
    assert runner.invoke(command, ["--kind", "c"]).exit_code == 2


def test_cache_directory_follows_the_environment() -> None:
    assert cache_dir({"OUTRIDER_CACHE_DIR": "/x"}) == Path("/x")
    assert cache_dir({"XDG_CACHE_HOME": "/y"}) == Path("/y/outrider")
