"""Who reaches whom under the chart's network policies, worked out as Kubernetes defines them."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from tests.deploy.cases import CASES, EVERYTHING, GPU, merged
from tests.deploy.chart import NAMESPACE, Manifest, containers, matches, of_kind, pods, render

pytestmark = pytest.mark.usefixtures("needs_helm")
SOMEWHERE = "203.0.113.7"
"""An address outside the cluster."""


class Network:
    """The pods of an installation and its policies.

    A peer is a component of it, or (namespace, labels), or an address.
    """

    def __init__(self, manifests: list[Manifest]) -> None:
        self._policies = [policy["spec"] for policy in of_kind(manifests, "NetworkPolicy")]
        self._pods = {pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod for _, pod in pods(manifests)}

    def connects(self, source: Any, target: Any, port: int, protocol: str = "TCP") -> bool:
        """Whether `source` may open a connection to `target`: the one must be let out and the other let in."""
        out = self._admits(source, "Egress", target, port, protocol, target)
        return out and self._admits(target, "Ingress", source, port, protocol, target)

    def _admits(self, pod: Any, direction: str, peer: Any, port: int, protocol: str, server: Any) -> bool:
        if pod not in self._pods:
            return True  # not ours to limit
        labels = self._pods[pod]["metadata"]["labels"]
        policies = [p for p in self._policies if matches(p["podSelector"]["matchLabels"], labels)]
        policies = [p for p in policies if direction in p["policyTypes"]]
        rules = [rule for policy in policies for rule in policy[direction.lower()]]
        return not policies or any(
            self._port_fits(rule, port, protocol, server) and self._peer_fits(rule, direction, peer) for rule in rules
        )

    def _port_fits(self, rule: Manifest, port: int, protocol: str, server: Any) -> bool:
        named: dict[Any, int] = {}
        if server in self._pods:
            named = {p["name"]: p["containerPort"] for c in containers(self._pods[server]) for p in c.get("ports", [])}
        ports = [(p["protocol"], named.get(p["port"], p["port"])) for p in rule.get("ports", [])]
        return not ports or (protocol, port) in ports

    def _peer_fits(self, rule: Manifest, direction: str, peer: Any) -> bool:
        fits = rule.get("from" if direction == "Ingress" else "to")
        return not fits or any(self._is(peer, one) for one in fits)

    def _is(self, peer: Any, meant: Manifest) -> bool:
        if "ipBlock" in meant:
            network = ipaddress.ip_network(meant["ipBlock"]["cidr"])
            return isinstance(peer, str) and peer not in self._pods and ipaddress.ip_address(peer) in network
        if peer in self._pods:
            namespace, labels = NAMESPACE, self._pods[peer]["metadata"]["labels"]
        elif isinstance(peer, tuple):
            namespace, labels = peer
        else:
            return False
        space = meant.get("namespaceSelector")
        in_space = (
            namespace == NAMESPACE
            if space is None
            else matches(space.get("matchLabels", {}), {"kubernetes.io/metadata.name": namespace, "team": namespace})
        )
        return in_space and matches(meant.get("podSelector", {}).get("matchLabels", {}), labels)


DNS = ("kube-system", (("k8s-app", "kube-dns"),))
PROMETHEUS = ("monitoring", (("app", "prometheus"),))
STRANGER = (NAMESPACE, (("app", "stranger"),))


@pytest.fixture
def network(needs_helm: None) -> Network:
    return Network(render(GPU))


def peer(namespace_and_labels: tuple[str, Any]) -> tuple[str, dict[str, str]]:
    namespace, labels = namespace_and_labels
    return namespace, Hashable(labels)


class Hashable(dict[str, str]):
    """Labels that can stand in a dictionary's key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@pytest.mark.parametrize(("role", "port"), [("target", 50053), ("draft", 50052)])
def test_only_coordinators_reach_workers(network: Network, role: str, port: int) -> None:
    assert network.connects("coordinator", role, port)
    for other in ("draft", "target", "redis", "models", "test", peer(STRANGER), peer(PROMETHEUS), SOMEWHERE):
        assert not network.connects(other, role, port), other


def test_only_coordinators_reach_redis(network: Network) -> None:
    assert network.connects("coordinator", "redis", 6379)
    for other in ("draft", "target", "models", "test", peer(STRANGER), peer(PROMETHEUS), SOMEWHERE):
        assert not network.connects(other, "redis", 6379), other


def test_everyone_reaches_the_client_port_unless_clients_are_named(network: Network) -> None:
    assert network.connects(peer(STRANGER), "coordinator", 50051)
    assert network.connects(SOMEWHERE, "coordinator", 50051)
    limited = Network(render(EVERYTHING))
    assert not limited.connects(peer(STRANGER), "coordinator", 50051)
    assert not limited.connects(SOMEWHERE, "coordinator", 50051)
    assert limited.connects(peer(("web", (("app", "site"),))), "coordinator", 50051)
    assert limited.connects("test", "coordinator", 50051)


def test_only_prometheus_reads_metrics(network: Network) -> None:
    for role in ("coordinator", "draft", "target"):
        assert network.connects(peer(PROMETHEUS), role, 9090)
        for other in ("draft", "redis", peer(STRANGER), SOMEWHERE):
            assert not network.connects(other, role, 9090), (role, other)


def test_names_are_resolved(network: Network) -> None:
    for role in ("coordinator", "draft", "target", "models"):
        assert network.connects(role, peer(DNS), 53, "UDP")
        assert network.connects(role, peer(DNS), 53)


def test_only_the_download_job_reaches_the_internet(network: Network) -> None:
    assert network.connects("models", SOMEWHERE, 443)
    for role in ("draft", "target", "redis"):
        assert not network.connects(role, SOMEWHERE, 443), role
    assert not network.connects("models", "redis", 6379)


def test_pods_that_download_themselves_may() -> None:
    network = Network(render(CASES["models in each pod"]))
    for role in ("draft", "target", "coordinator"):
        assert network.connects(role, SOMEWHERE, 443)
    assert not network.connects("redis", SOMEWHERE, 443)


def test_coordinators_reach_the_kubernetes_api(network: Network) -> None:
    assert network.connects("coordinator", "10.96.0.1", 443)
    assert network.connects("coordinator", "10.0.0.2", 6443)
    narrow = merged(GPU, {"networkPolicy": {"apiServerCIDRs": ["10.0.0.2/32"]}})
    assert not Network(render(narrow)).connects("coordinator", SOMEWHERE, 443)


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://mirror.lan:8080", 8080),
        ("https://mirror.lan:8443/hub", 8443),
        ("https://[2001:db8::1]", 443),
        ("http://mirror.lan", 80),
    ],
)
def test_models_come_from_the_mirrors_port(endpoint: str, port: int) -> None:
    mirrored = merged(GPU, {"models": {"hubEndpoint": endpoint}})
    for values, role in ((mirrored, "models"), (merged(mirrored, {"models": {"offline": False}}), "target")):
        network = Network(render(values))
        assert [known for known in (80, 443, 8080, 8443) if network.connects(role, SOMEWHERE, known)] == [port]


EXTERNAL_REDIS = {
    "external Redis": {6380},
    "external Redis in a secret": {6380, 6381},
    "external Redis by Sentinels": {26380, 26379, 26381, 6390},
    "external Redis with an authority": {6379},
    "external Redis in plaintext": {6379},
}
"""The ports that each of them has."""


@pytest.mark.parametrize("case", [name for name, values in CASES.items() if "external" in values.get("redis", {})])
def test_coordinators_reach_an_external_redis(case: str) -> None:
    network = Network(render(CASES[case]))
    ports = {6379, 6380, 6381, 6390, 26379, 26380, 26381}
    assert {port for port in ports if network.connects("coordinator", SOMEWHERE, port)} == EXTERNAL_REDIS[case]
    assert not any(network.connects(role, SOMEWHERE, port) for role in ("draft", "target") for port in ports)


def test_a_policy_that_is_not_there_needs_no_ports() -> None:
    hidden = {"redis": {"enabled": False, "external": {"existingSecret": "redis-url"}}}
    assert not of_kind(render(merged(GPU, hidden, {"networkPolicy": {"enabled": False}})), "NetworkPolicy")


def test_traces_get_out_only_where_they_are_sent() -> None:
    network = Network(render(EVERYTHING))
    for role in ("coordinator", "draft", "target"):
        assert network.connects(role, peer(("monitoring", (("app", "collector"),))), 4317)
        assert not network.connects(role, SOMEWHERE, 4317)
    assert not Network(render(GPU)).connects("target", peer(("monitoring", (("app", "collector"),))), 4317)
