"""The dashboard and the alerts as they are shipped, and what is in them.

Owns: where they lie, and how their queries are read. Must not know: who evaluates them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy" / "helm" / "outrider" / "files"
ALERTS, DASHBOARD = FILES / "alerts.yaml", FILES / "dashboard.json"
ALERTS_TEST = Path(__file__).parent / "alerts_test.yaml"
DOCS = ROOT / "docs" / "metrics.md"

ONLY_WITH_A_GPU = "outrider_device_utilisation_ratio"

_NAME = re.compile(r"\b(outrider|process)_[a-z0-9_]+\b")
_VARIABLES = {"$__rate_interval": "10s", "$job": ".*", "$model_name": ".*"}


class Query(NamedTuple):
    """A panel's query, with Grafana's variables filled in."""

    panel: str
    expression: str


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def queries() -> list[Query]:
    return [
        Query(panel["title"], _filled_in(target["expr"]))
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


def _filled_in(expression: str) -> str:
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def names_in(expression: str) -> set[str]:
    return {match.group() for match in _NAME.finditer(expression)}
