from __future__ import annotations

import pytest

from services.common.addresses import is_local, is_loopback, is_protected_url
from services.common.errors import ConfigError
from services.common.peer_names import PeerNames
from services.common.worker_config import WorkerConfig
from services.coordinator.config import CoordinatorConfig

TLS = {"tls_cert": "c", "tls_key": "k", "tls_ca": "a"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker.example.org", ""])  # noqa: S104
def test_plaintext_beyond_loopback_needs_to_be_asked_for(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        WorkerConfig(host=host)
    assert WorkerConfig(host=host, insecure=True).probe_port_number == 8081
    assert WorkerConfig(host=host, **TLS).probe_port_number == 8081  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_nothing_and_has_no_probe(host: str) -> None:
    assert WorkerConfig(host=host).probe_port_number is None
    assert WorkerConfig(host=host, probe_port="0").probe_port_number == 0


@pytest.mark.parametrize("missing", TLS)
def test_tls_files_come_together(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        WorkerConfig(**{name: value for name, value in TLS.items() if name != missing})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"probe_port": "x"}, "probe_port"),
        ({"probe_port": "65536"}, "probe_port"),
        ({"max_connections": 0}, "max_connections"),
        ({"tls_coordinator_names": " , ", **TLS}, "tls_coordinator_names"),
    ],
)
def test_bad_values_are_named(settings: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        WorkerConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"targets": "target:1"}, "targets"),
        ({"drafts": "a=10.0.0.1:1@2"}, "drafts"),
        ({"redis_url": "redis://redis:6379"}, "redis_url"),
        ({"redis_url": "redis://:se:cret@[half"}, "redis_url"),
        ({"tls_client_ca": "a"}, "tls_client_ca"),
    ],
)
def test_a_coordinator_sends_nothing_away_in_plaintext_unasked(settings: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        CoordinatorConfig(tokenizer="simulated", **settings)  # type: ignore[arg-type]
    assert "cret" not in str(caught.value)


def test_a_coordinator_does_where_it_is_protected_or_asked_to() -> None:
    remote = {"tokenizer": "simulated", "targets": "t:1", "drafts": "d:1"}
    for url in ("rediss://redis:1", "rediss+sentinel://user:p@one:26379,two/main/0"):
        CoordinatorConfig(**remote, redis_url=url, **TLS)  # type: ignore[arg-type]
    CoordinatorConfig(**remote, redis_url="redis://redis:1", insecure_redis=True, **TLS)  # type: ignore[arg-type]
    CoordinatorConfig(**remote, redis_url="redis://redis:1", insecure=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "local"),
    [("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("unix:/x", True), ("h:1", False), ("::1", True)],
)
def test_addresses_stay_on_this_machine_or_do_not(address: str, local: bool) -> None:
    assert is_local(address) is local


def test_a_name_that_only_looks_like_loopback_is_none() -> None:
    assert not is_loopback("127.0.0.1.example.org")
    assert not is_loopback("localhost.example.org")


@pytest.mark.parametrize(
    ("url", "protected"),
    [
        ("unix:///s", True),
        ("redis://h", False),
        ("redis://127.0.0.1:1", True),
        ("rediss://h", True),
        ("rediss+sentinel://one:26379,two/main", True),
        ("redis+sentinel://one:26379,two/main", False),
        ("redis+sentinel://127.0.0.1:1,localhost/main", True),
        ("redis+sentinel://127.0.0.1:1,elsewhere/main", False),
        ("rediss-or-so://h", False),
        ("unixoid://h", False),
    ],
)
def test_a_store_is_protected_by_tls_or_by_staying_on_this_machine(url: str, protected: bool) -> None:
    assert is_protected_url(url) is protected


@pytest.mark.parametrize(
    ("pattern", "name", "admitted"),
    [
        ("coordinator", "coordinator", True),
        ("coordinator", "Xcoordinator", False),
        ("coordinator", "coordinator.a", False),
        ("*.coordinators", "a.coordinators", True),
        ("*.coordinators", "a.b.coordinators", False),
        ("spiffe://c/ns/*/sa/x", "spiffe://c/ns/o/sa/x", True),
        ("spiffe://c/ns/*/sa/x", "spiffe://c/ns/o/sa/y/sa/x", False),
        ("a.b", "aXb", False),
        ("a", "a\nb", False),
    ],
)
def test_names_match_whole_and_wildcards_within_a_part(pattern: str, name: str, admitted: bool) -> None:
    assert PeerNames([pattern]).admits(name) is admitted
