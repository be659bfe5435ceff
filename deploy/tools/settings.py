"""`python -m deploy.tools.settings`: writes which settings each service knows to where the chart reads them.

Owns: the form of that file. Must not know: what the settings mean, which of them the chart sets itself.
"""

from __future__ import annotations

import json
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from services.coordinator.config import CoordinatorConfig
from services.draft.config import DraftConfig
from services.target.config import TargetConfig

FILE = Path(__file__).parents[1] / "helm" / "outrider" / "files" / "settings.json"
CONFIGS = {"coordinator": CoordinatorConfig, "draft": DraftConfig, "target": TargetConfig}


def settings() -> dict[str, dict[str, Any]]:
    """By service and name: the type, or the list of choices."""
    return {service: _settings_of(config) for service, config in CONFIGS.items()}


def _settings_of(config: type) -> dict[str, Any]:
    kinds = typing.get_type_hints(config)
    return {field.name: list(field.metadata["choices"]) or kinds[field.name].__name__ for field in fields(config)}


def text() -> str:
    return json.dumps(settings(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
