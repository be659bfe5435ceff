"""The HTML report: one file that refers to nothing outside itself.

Owns: what stands on the page, and in which order. Must not know: how plots are drawn, where the file goes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import jinja2

from services.cli.bench.document import DEFINITIONS, Document
from services.cli.bench.machine import Environment
from services.cli.bench.show import figures, formula_line, grids, identical_of, number
from services.cli.failure import CommandFailed

_TEMPLATE = Path(__file__).with_name("page.html")


class Card(NamedTuple):
    """A figure to be seen first."""

    name: str
    value: str


def check_plots() -> None:
    """Raises CommandFailed where plots cannot be drawn, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandFailed("--html needs matplotlib: pip install 'outrider[bench]'")


def render(document: Document) -> str:
    """The page."""
    from services.cli.bench.plots import plots  # half a second, and an extra

    report = document.first.report
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_TEMPLATE.read_text())
    several = [f"{len(document.cases)} cases; figures and tables are of the first where they name none"]
    formula = [formula_line(report.formula)] if report.formula else []
    return template.render(
        title="Outrider: speculative decoding measured",
        subtitle=f"{document.configuration.get('target', 'a running cluster')}: {document.first.case.label}",
        cards=_cards(document),
        sentences=[*(several if len(document.cases) > 1 else []), *figures(report)[2:], *formula, *document.notes],
        plots=list(plots(document)),
        grids=list(grids(document)),
        sections=[
            ("How it was measured", document.configuration | _machine(document.environment)),
            ("Definitions", DEFINITIONS),
        ],
    )


def _cards(document: Document) -> list[Card]:
    report = document.first.report
    rates = (mode.tokens_per_s if mode else None for mode in (report.plain, report.speculative))
    return [
        Card("speed-up, speculative over plain", number(report.speedup)),
        Card("speed-up of the decode phase", number(report.decode_speedup)),
        *(
            Card(f"tokens/s, {name}", number(rate, 1))
            for name, rate in zip(("plain", "speculative"), rates, strict=True)
        ),
        Card("mean acceptance length", number(report.acceptance.mean_acceptance_length)),
        Card("conditional acceptance", number(report.acceptance.alpha)),
        Card("identical outputs", identical_of(report.overall)),
        Card("failed requests", str(report.failed_requests)),
    ]


def _machine(environment: Environment) -> dict[str, str]:
    return {
        "command": environment.command,
        "processor": f"{environment.cpu}, {environment.num_cores} cores",
        "memory": f"{number(environment.memory_gib, 1)} GiB",
        "python": environment.python,
        "commit": environment.commit or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in environment.versions.items()),
    }
