"""values.yaml, its sentences and its schema belong together. Needs no helm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.tools import settings
from tests.deploy.chart import CHART, ROOT

VALUES = CHART / "values.yaml"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return SCHEMA["definitions"][reference.rpartition("/")[2]] if reference else schema  # type: ignore[no-any-return]


def schemas(schema: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object's schema below `schema`."""
    schema = resolved(schema)
    if "properties" in schema:
        yield place, schema
        for name, part in schema["properties"].items():
            yield from schemas(part, f"{place}.{name}")
    if "items" in schema:
        yield from schemas(schema["items"], f"{place}[]")


def test_values_fit_their_schema() -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(yaml.safe_load(VALUES.read_text()))


def test_the_chart_knows_the_settings_that_the_services_have() -> None:
    assert settings.FILE.read_text() == settings.text(), "run python -m deploy.tools.settings"
    for service, config in settings.CONFIGS.items():
        assert {field.name for field in fields(config)} == set(settings.settings()[service])


def test_no_object_takes_unknown_names() -> None:
    places = dict(schemas(SCHEMA))
    assert len(places) > 50
    assert not [place for place, schema in places.items() if schema.get("additionalProperties") is not False]


def test_schema_and_values_know_the_same_names() -> None:
    def compare(schema: dict[str, Any], values: dict[str, Any], place: str) -> None:
        schema = resolved(schema)
        known = set(schema.get("properties", {})) - ({"global"} if not place else set())
        if known and not place.endswith(".resources"):  # Kubernetes' own words
            assert known == set(values), place
            for name in known:
                if isinstance(values[name], dict):
                    compare(schema["properties"][name], values[name], f"{place}.{name}")

    compare(SCHEMA, yaml.safe_load(VALUES.read_text()), "")


def test_every_value_has_a_sentence() -> None:
    lines = VALUES.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\s*\w+:", line)]
    assert len(keys) > 150
    for i in keys:
        comment = lines[i - 1].strip()
        assert comment.startswith("# "), f"line {i + 1}: {lines[i]}"
        assert comment.endswith("."), f"line {i}: {comment}"


@pytest.mark.parametrize("name", ["dashboard.json", "alerts.yaml"])
def test_files_hold_what_the_templates_expect(name: str) -> None:
    content = yaml.safe_load((CHART / "files" / name).read_text())
    assert content["title"] if name == "dashboard.json" else all(group["rules"] for group in content["groups"])


def test_every_alert_is_explained() -> None:
    content = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    alerts = {rule["alert"] for group in content["groups"] for rule in group["rules"] if "alert" in rule}
    explained = re.findall(r"^### (Outrider\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert alerts <= set(explained)
    assert len(explained) == len(set(explained))
