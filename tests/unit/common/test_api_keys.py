from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.api_keys import KeyFile, KeyOwner, KeyRing, Limits, new_key, read_ring, write_ring
from services.common.errors import ConfigError

LIMITS = Limits(2.5, 1000, 3)


def test_a_key_is_known_by_its_ring_alone_and_kept_nowhere() -> None:
    key, stored = new_key("today")
    ring = KeyRing([KeyOwner("ann", keys=(stored,))])
    owner = ring.owner_of(key)
    assert owner is not None
    assert owner.name == "ann"
    assert KeyRing([KeyOwner("ann", keys=(new_key("today")[1],))]).owner_of(key) is None
    assert key[22:] not in repr(ring.owners)
    assert len({new_key("today")[0] for _ in range(100)}) == 100


@given(st.text(max_size=80), st.integers(0, 64), st.characters())
def test_nothing_else_is_taken_for_a_key(text: str, at: int, character: str) -> None:
    key, stored = new_key("today")
    ring = KeyRing([KeyOwner("ann", keys=(stored,))])
    changed = key[:at] + character + key[at + 1 :]
    assert ring.owner_of(text) is None
    assert (ring.owner_of(changed) is None) == (changed != key)


def test_a_file_holds_what_was_written_and_others_cannot_read_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    owners = [KeyOwner("ann", LIMITS, (new_key("a")[1], new_key("b")[1])), KeyOwner("bob", keys=(new_key("c")[1],))]
    write_ring(path, KeyRing(owners))
    assert list(read_ring(path).owners.values()) == owners
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def broken_files() -> list[object]:
    good = {"key_id": "0" * 12, "sha256": "0" * 64, "created": ""}
    limits = {"requests_per_s": 0, "tokens_per_min": 0, "max_sessions": 0}
    return [
        [],
        {"version": 2, "owners": {}},
        {"version": 1},
        {"version": 1, "owners": {"ann": {}}},
        {"version": 1, "owners": {"anonymous": {**limits, "keys": [good]}}},
        {"version": 1, "owners": {"../x": {**limits, "keys": [good]}}},
        {"version": 1, "owners": {"ann": {**limits, "keys": [good, good]}}},
        {"version": 1, "owners": {"ann": {**limits, "keys": [{**good, "sha256": "outrider-secret"}]}}},
        {"version": 1, "owners": {"ann": {**limits, "requests_per_s": -1, "keys": [good]}}},
        {"version": 1, "owners": {"ann": {**limits, "requests_per_s": "nan", "keys": [good]}}},
        {"version": 1, "owners": {"ann": {**limits, "tokens_per_min": float("inf"), "keys": [good]}}},
        {"version": 1, "owners": {"ann": {**limits, "requests_per_s": 10**400, "keys": [good]}}},
    ]


@pytest.mark.parametrize("document", broken_files())
def test_a_file_that_makes_no_sense_is_refused_without_quoting_it(tmp_path: Path, document: object) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError) as caught:
        read_ring(path)
    assert "secret" not in str(caught.value)


def test_a_changed_file_is_taken_over_and_a_broken_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, first_stored = new_key("a")
    second, second_stored = new_key("b")
    write_ring(path, KeyRing([KeyOwner("ann", keys=(first_stored,))]))
    file = KeyFile(path)
    write_ring(path, KeyRing([KeyOwner("ann", keys=(second_stored,))]))
    assert (file.current().owner_of(first), file.current().owner_of(second) is None) == (None, False)
    path.write_text("{")
    assert file.current().owner_of(second) is not None
    path.unlink()
    assert file.current().owner_of(second) is not None
    with pytest.raises(ConfigError, match="No such file"):
        KeyFile(path)
