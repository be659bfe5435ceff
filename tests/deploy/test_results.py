"""Results that are kept say on which commit they were measured."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deploy.tools import check_images
from services.cli.bench.machine import Environment, environment
from tests.e2e import test_rolling_update as rolling_update
from tests.fuzz import __main__ as fuzz

HERE = environment([])
FIELDS = set(Environment.__dataclass_fields__)


def check(environment: Any, command: str) -> None:
    assert set(environment) == FIELDS
    assert environment["commit"] == HERE.commit
    assert environment["command"].startswith(command)


def test_of_the_images() -> None:
    document: Any = check_images.as_document("buildah", {"generated_tokens": 16})
    assert (document["engine"], document["generated_tokens"]) == ("buildah", 16)
    check(document["environment"], "python -m deploy.tools.check_images")


def test_of_the_fuzzing() -> None:
    counts = {"b": Counter({"OK": 1, "NOT_FOUND": 2}), "a": Counter({"OK": 4})}
    document: Any = fuzz.as_document(counts, {"seconds": 3.0})
    assert (document["num_inputs"], document["seconds"]) == (7, 3.0)
    assert list(document["outcomes"]["b"]) == ["NOT_FOUND", "OK"]
    check(document["environment"], "python -m tests.fuzz")


@pytest.mark.parametrize("known", [{}, {"earlier": 1}], ids=["no file", "a file"])
def test_of_updates(known: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "upgrade.json"
    if known:
        path.write_text(json.dumps(known))
    rolling_update.record_results(path, "one to another", [])
    document = json.loads(path.read_text())
    assert document.keys() == {*known, "one to another"}
    check(document["one to another"]["environment"], "make check-upgrade")
