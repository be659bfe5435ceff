from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from services.cli.failure import CommandFailed
from services.cli.keys import keys
from services.client import Access
from services.common.api_keys import read_ring
from services.common.errors import ConfigError


def run(*arguments: str, path: Path) -> Result:
    result = CliRunner().invoke(keys, [*arguments, "--file", str(path)], catch_exceptions=True)
    if isinstance(result.exception, CommandFailed):
        raise result.exception
    return result


def test_a_key_is_made_rotated_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = run("add", "ann", "--tokens-per-min", "100", "--max-sessions", "2", path=path).stdout.strip()
    second = json.loads(run("add", "ann", "--max-sessions", "0", "--json", path=path).stdout)
    ring = read_ring(path)
    assert ring.owner_of(first) == ring.owner_of(second["key"]) == ring.owners["ann"]
    assert (ring.owners["ann"].limits.tokens_per_min, ring.owners["ann"].limits.max_sessions) == (100, 0)
    listed = run("list", path=path).stdout + run("list", "--json", path=path).stdout
    assert second["key_id"] in listed
    assert first[22:] not in listed
    assert ring.owners["ann"].keys[0].sha256 not in listed
    run("remove", second["key_id"], path=path)
    assert read_ring(path).owner_of(second["key"]) is None
    assert read_ring(path).owner_of(first) is not None
    run("remove", "ann", path=path)
    assert read_ring(path).owners == {}


def test_what_cannot_be_is_said_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for arguments, message in (
        (("add", "Bad Name"), "name"),
        (("add", "anonymous"), "anonymous"),
        (("add", "ann", "--max-sessions", "-1"), "max_sessions"),
        (("list",), "No such file"),
    ):
        with pytest.raises(CommandFailed, match=message):
            run(*arguments, path=path)
    run("add", "ann", path=path)
    with pytest.raises(CommandFailed, match="no name and no key id bob"):
        run("remove", "bob", path=path)


def test_a_key_goes_to_other_machines_by_tls_alone() -> None:
    with pytest.raises(ConfigError, match="plaintext"):
        Access(api_key="k").metadata(["10.0.0.1:1"])
    for access in (Access(api_key="k", tls_ca="system"), Access(api_key="k", insecure=True)):
        assert access.metadata(["10.0.0.1:1"]) == (("authorization", "Bearer k"),)
    assert Access(api_key="k").metadata(["localhost:1"])
    assert "secret" not in repr(Access(api_key="secret"))
    with pytest.raises(ConfigError, match="api_key"):
        Access(api_key="k\nx").metadata(["localhost:1"])
    with pytest.raises(ConfigError, match="tls_ca"):
        Access(tls_cert="c", tls_key="k").load_tls()
