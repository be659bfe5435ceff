"""What one manifest says of another is true, in every set of values: the schemas can't see that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from services.common.config import load, reject_unknown
from services.coordinator.config import CoordinatorConfig
from services.draft.config import DraftConfig
from services.target.config import TargetConfig
from tests.deploy.cases import CASES, GIVEN_SECRETS
from tests.deploy.chart import (
    NAMESPACE,
    Manifest,
    component,
    containers,
    env_of,
    matches,
    named,
    of_kind,
    pods,
    render,
)

pytestmark = pytest.mark.usefixtures("needs_helm")
WORKLOADS = ("Deployment", "StatefulSet", "Job")
CONFIGS = {"coordinator": CoordinatorConfig, "draft": DraftConfig, "target": TargetConfig}
SERVICES = {
    "coordinator": "outrider.v1.CoordinatorService",
    "draft": "outrider.v1.DraftService",
    "target": "outrider.v1.TargetService",
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manifests(case: str, needs_helm: None) -> list[Manifest]:
    return render(CASES[case])


def selected(manifests: list[Manifest], selector: dict[str, str]) -> list[tuple[str, Manifest]]:
    """The pods that a selector means."""
    return [(name, pod) for name, pod in pods(manifests) if matches(selector, pod["metadata"]["labels"])]


def services_of(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """The containers that run a service of the project: its role, container and pod."""
    for _, pod in pods(manifests):
        for container in pod["spec"]["containers"]:
            if container["name"] in CONFIGS:
                yield container["name"], container, pod


def ports_of(pod: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for c in containers(pod) for port in c.get("ports", [])}


def test_names_are_unique_and_short_enough(manifests: list[Manifest]) -> None:
    keys = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(keys) == len(set(keys))
    for kind, name in keys:
        assert len(name) <= (52 if kind == "StatefulSet" else 63), name  # the pods' label adds a hash of 10 characters
        assert all(m["metadata"]["namespace"] == NAMESPACE for m in manifests)


def test_each_workload_selects_its_own_pods_and_no_others(manifests: list[Manifest]) -> None:
    for workload in of_kind(manifests, "Deployment", "StatefulSet"):
        found = selected(manifests, workload["spec"]["selector"]["matchLabels"])
        assert [name for name, _ in found] == [workload["metadata"]["name"]]


def test_services_lead_to_ports_of_pods_of_one_kind(manifests: list[Manifest]) -> None:
    for service in of_kind(manifests, "Service"):
        found = selected(manifests, service["spec"]["selector"])
        assert len(found) == 1, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports_of(found[0][1])


def test_each_stateful_set_has_its_service(manifests: list[Manifest]) -> None:
    for workload in of_kind(manifests, "StatefulSet"):
        service = named(manifests, "Service", workload["spec"]["serviceName"])
        assert matches(service["spec"]["selector"], workload["spec"]["template"]["metadata"]["labels"])


def test_every_service_accepts_its_settings(manifests: list[Manifest]) -> None:
    found = 0
    for role, container, _ in services_of(manifests):
        environ = env_of(container)
        reject_unknown(CONFIGS[role], known=("CACHE_DIR", "ADDRESS"), environ=environ)
        config = load(CONFIGS[role], environ=environ)
        assert config.port == ports_of({"spec": {"containers": [container]}})["grpc"]
        found += 1
    assert found >= 2


def test_services_listen_where_their_pods_say(manifests: list[Manifest]) -> None:
    for _, container, _ in services_of(manifests):
        environ, ports = env_of(container), ports_of({"spec": {"containers": [container]}})
        assert {name: int(environ[f"OUTRIDER_{setting}"]) for name, setting in _PORT_SETTINGS.items()} == ports


_PORT_SETTINGS = {"grpc": "PORT", "probe": "PROBE_PORT", "metrics": "METRICS_PORT"}


def test_coordinators_look_for_workers_where_they_are(manifests: list[Manifest]) -> None:
    (environ,) = (env_of(container) for role, container, _ in services_of(manifests) if role == "coordinator")
    for role, setting in (("target", "OUTRIDER_TARGETS"), ("draft", "OUTRIDER_DRAFTS")):
        named_services = re.findall(r"kubernetes://([^/]+)/([^:]+):(\w+)", environ[setting])
        workers = [m["metadata"]["name"] for m in of_kind(manifests, *WORKLOADS) if component(m) == role]
        assert [service for _, service, _ in named_services] == workers
        for namespace, service, port in named_services:
            spec = named(manifests, "Service", service)["spec"]
            assert namespace == NAMESPACE
            assert spec["clusterIP"] == "None"
            assert port in [p["name"] for p in spec["ports"]]


def test_probes_ask_the_service_itself_on_the_probe_port(manifests: list[Manifest]) -> None:
    for role, container, _ in services_of(manifests):
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[name]["grpc"]["port"] == ports_of({"spec": {"containers": [container]}})["probe"]
        assert container["livenessProbe"]["grpc"]["service"] == ""  # a drained or waiting service is alive
        assert container["readinessProbe"]["grpc"]["service"] == SERVICES[role]


def test_pods_get_longer_than_they_need_to_drain(manifests: list[Manifest]) -> None:
    for _, container, pod in services_of(manifests):
        sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert sleep == "sleep"
        drain_s = float(env_of(container)["OUTRIDER_DRAIN_S"])
        assert pod["spec"]["terminationGracePeriodSeconds"] > int(seconds) + drain_s


def test_what_is_referred_to_is_there(case: str, manifests: list[Manifest]) -> None:
    certificates = {m["spec"]["secretName"] for m in of_kind(manifests, "Certificate")}
    there = {kind: {m["metadata"]["name"] for m in of_kind(manifests, kind)} for kind in _REFERABLE}
    there["Secret"] |= GIVEN_SECRETS.get(case, set()) | certificates
    there["ServiceAccount"] |= {"outrider-reader", "default"} if case == "own account" else set()
    there["PersistentVolumeClaim"] |= {"models"} if case == "models already there" else set()
    for name, pod in pods(manifests):
        for kind, referred in _references(pod):
            assert referred in there[kind], f"{name} refers to the {kind} {referred}"


def test_given_secrets_are_used(case: str, manifests: list[Manifest]) -> None:
    used = {name for _, pod in pods(manifests) for kind, name in _references(pod) if kind == "Secret"}
    used |= {tls["secretName"] for m in of_kind(manifests, "Ingress") for tls in m["spec"]["tls"]}
    assert GIVEN_SECRETS.get(case, set()) <= used


_REFERABLE = ("Secret", "ConfigMap", "PersistentVolumeClaim", "ServiceAccount")


def _references(pod: Manifest) -> Iterator[tuple[str, str]]:
    spec = pod["spec"]
    yield "ServiceAccount", spec["serviceAccountName"]
    for secret in spec.get("imagePullSecrets", []):
        yield "Secret", secret["name"]
    for volume in spec["volumes"]:
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in containers(pod):
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                yield "Secret", variable["valueFrom"]["secretKeyRef"]["name"]


def test_volumes_are_mounted_and_mounts_have_volumes(manifests: list[Manifest]) -> None:
    claims = {
        m["metadata"]["name"]: m["spec"].get("volumeClaimTemplates", []) for m in of_kind(manifests, "StatefulSet")
    }
    for name, pod in pods(manifests):
        volumes = {v["name"] for v in pod["spec"]["volumes"]} | {c["metadata"]["name"] for c in claims.get(name, [])}
        mounted = {mount["name"] for c in containers(pod) for mount in c["volumeMounts"]}
        assert volumes == mounted, name


def test_files_that_services_read_are_mounted(manifests: list[Manifest]) -> None:
    for role, container, _ in services_of(manifests):
        mounts = [PurePosixPath(mount["mountPath"]) for mount in container["volumeMounts"]]
        environ = env_of(container)
        paths = [environ[name] for name in _PATHS if environ.get(name, "").startswith("/")]
        paths += re.findall(r"=(/[^&]+)", environ.get("OUTRIDER_REDIS_URL", ""))
        tokenizers = [part.rpartition("=")[2] for part in environ.get("OUTRIDER_TOKENIZER", "").split(",")]
        paths += [path for path in tokenizers if path.startswith("/")]
        for path in paths:
            assert any(PurePosixPath(path).is_relative_to(mount) for mount in mounts), f"{role}: {path}"


_PATHS = (
    "OUTRIDER_TLS_CERT",
    "OUTRIDER_TLS_KEY",
    "OUTRIDER_TLS_CA",
    "OUTRIDER_TLS_CLIENT_CA",
    "OUTRIDER_API_KEYS_FILE",
    "OUTRIDER_MODEL",
    "OUTRIDER_CACHE_DIR",
)


def test_models_are_where_they_are_downloaded_to(manifests: list[Manifest]) -> None:
    downloads = [c for _, pod in pods(manifests) for c in containers(pod) if c["name"] == "download"]
    paths = {c["args"][i + 2] for c in downloads for i in range(0, len(c["args"]), 3)}
    if not downloads:
        return
    served = {env_of(c).get("OUTRIDER_MODEL", "") for _, c, _ in services_of(manifests)}
    assert {path for path in served if path.startswith("/models/acme--")} == paths
    waited = {
        p for _, pod in pods(manifests) for c in containers(pod) if c["name"] == "wait-for-models" for p in c["args"]
    }
    assert waited in (paths, set())


def test_containers_may_do_nothing_that_they_need_not(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests):
        assert pod["spec"]["enableServiceLinks"] is False, (
            name
        )  # else OUTRIDER_..._SERVICE_HOST stops a service's start
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["runAsUser"] > 0
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["requests"]


def test_only_coordinators_may_ask_the_api_and_only_for_endpoints(manifests: list[Manifest]) -> None:
    for name, pod in pods(manifests):
        is_coordinator = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "coordinator"
        assert pod["spec"].get("automountServiceAccountToken", True) is is_coordinator, name
    for role in of_kind(manifests, "Role"):
        assert role["rules"] == [
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
        ]
    assert not of_kind(manifests, "ClusterRole", "ClusterRoleBinding")


def test_budgets_and_scalers_mean_workloads(manifests: list[Manifest]) -> None:
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        assert len(selected(manifests, budget["spec"]["selector"]["matchLabels"])) == 1
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        reference = scaler["spec"]["scaleTargetRef"]
        workload = named(manifests, reference["kind"], reference["name"])
        assert "replicas" not in workload["spec"]  # an upgrade would undo what was scaled
        for trigger in scaler["spec"].get("triggers", []):
            services = re.findall(r'service="([^"]+)"', trigger["metadata"]["query"])
            assert services == [reference["name"]]


def test_routes_and_monitors_mean_services(manifests: list[Manifest]) -> None:
    for ingress in of_kind(manifests, "Ingress"):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        service = named(manifests, "Service", backend["name"])
        assert backend["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]
    for route in of_kind(manifests, "GRPCRoute"):
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        service = named(manifests, "Service", backend["name"])
        assert backend["port"] in [port["port"] for port in service["spec"]["ports"]]
    for monitor in of_kind(manifests, "ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        services = [m for m in of_kind(manifests, "Service") if matches(selector, m["metadata"]["labels"])]
        with_metrics = [s for s in services if "metrics" in [port["name"] for port in s["spec"]["ports"]]]
        assert {component(s) for s in with_metrics} == {component(m) for m in of_kind(manifests, *WORKLOADS)} & {
            *CONFIGS
        }
