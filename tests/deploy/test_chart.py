"""What operators of GPU clusters look for in a chart, in the manifests that they get."""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from typing import Any

import pytest
import yaml

from deploy.tools.fetch import program
from deploy.tools.images import version
from services.common.metrics import PREFIX
from services.common.worker_metrics import KV_USAGE, QUEUED, STEP_S
from tests.deploy.cases import CASES, CERT_MANAGER, COMMIT, EVERYTHING, GPU, SIMULATED, merged
from tests.deploy.chart import (
    CHART,
    ROOT,
    Manifest,
    containers,
    env_of,
    matches,
    named,
    of_kind,
    pods,
    render,
)

pytestmark = pytest.mark.usefixtures("needs_helm")


def pod_of(manifests: list[Manifest], owner: str) -> Manifest:
    return dict(pods(manifests))[f"test-outrider-{owner}"]


def main_container(manifests: list[Manifest], owner: str) -> Manifest:
    return next(c for c in containers(pod_of(manifests, owner)) if c["name"] == owner.rpartition("-")[2])


def test_helm_finds_nothing_to_complain_about() -> None:
    done = subprocess.run(
        [program("helm"), "lint", "--strict", CHART, "--values", CHART / "ci" / "simulated.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_installs_the_version_that_it_lies_beside() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == version()


@pytest.mark.parametrize("name", [path.name for path in sorted((CHART / "ci").glob("*.yaml"))])
def test_examples_install(name: str) -> None:
    assert render(yaml.safe_load((CHART / "ci" / name).read_text()))


def documented() -> list[dict[str, Any]]:
    """The values that docs/operations.md shows, each merged over what it leaves out."""
    text = (ROOT / "docs" / "operations.md").read_text()
    blocks = re.findall(r"^( *)```yaml\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [merged(GPU, yaml.safe_load(textwrap.dedent(block))) for _, block in blocks]


def test_the_documentations_values_install() -> None:
    assert len(documented()) == 3
    for values in documented():
        assert render(values)


def test_a_draft_gets_one_gpu_and_a_target_two() -> None:
    manifests = render(GPU)
    for owner, count in (("draft", 1), ("target", 2)):
        resources = main_container(manifests, owner)["resources"]
        assert resources["limits"] == {"nvidia.com/gpu": count}
        assert resources["requests"]["nvidia.com/gpu"] == count
        assert "cpu" in resources["requests"]
    assert "nvidia.com/gpu" not in json.dumps(main_container(manifests, "coordinator")["resources"])


def test_replicas_of_drafts_and_targets_are_set_apart() -> None:
    manifests = render(
        merged(GPU, {"draft": {"replicas": 5}, "target": {"replicas": 3}, "coordinator": {"replicas": 4}})
    )
    assert named(manifests, "Deployment", "test-outrider-draft")["spec"]["replicas"] == 5
    assert named(manifests, "StatefulSet", "test-outrider-target")["spec"]["replicas"] == 3
    assert named(manifests, "Deployment", "test-outrider-coordinator")["spec"]["replicas"] == 4


def test_one_part_can_be_scaled_automatically_and_the_others_not() -> None:
    scaled = {"draft": {"autoscaling": {"enabled": True}}, "autoscaling": {"prometheusAddress": "http://p:9090"}}
    manifests = render(merged(GPU, scaled))
    (scaler,) = of_kind(manifests, "ScaledObject", "HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"]["name"] == "test-outrider-draft"
    assert named(manifests, "StatefulSet", "test-outrider-target")["spec"]["replicas"] == 1


def test_each_part_is_scaled_by_metrics_of_its_own() -> None:
    manifests = render(EVERYTHING)
    (hpa,) = of_kind(manifests, "HorizontalPodAutoscaler")
    assert hpa["spec"]["metrics"][0]["resource"]["name"] == "cpu"
    queries = {
        scaler["metadata"]["name"].rpartition("-")[2]: [t["metadata"]["query"] for t in scaler["spec"]["triggers"]]
        for scaler in of_kind(manifests, "ScaledObject")
    }
    names = {part: sorted(re.findall(r"outrider_\w+", " ".join(texts))) for part, texts in queries.items()}
    assert names == {
        "draft": [PREFIX + QUEUED.name, f"{PREFIX}{STEP_S.name}_sum"],
        "target": [PREFIX + KV_USAGE.name, PREFIX + QUEUED.name],
    }


def test_workers_are_taken_away_one_at_a_time_and_no_faster_than_they_drain() -> None:
    manifests = render(EVERYTHING)
    for scaler in of_kind(manifests, "ScaledObject"):
        behavior = scaler["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
        (policy,) = behavior["policies"]
        grace = pod_of(manifests, scaler["metadata"]["name"].rpartition("-")[2])["spec"][
            "terminationGracePeriodSeconds"
        ]
        assert policy == {"type": "Pods", "value": 1, "periodSeconds": grace}


def test_the_whole_model_load_fits_into_the_startup_probe() -> None:
    manifests = render(merged(GPU, {"target": {"startupSeconds": 3601}}))
    probe = main_container(manifests, "target")["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 3601
    assert probe["grpc"]["service"] == "outrider.v1.TargetService"
    assert (
        main_container(manifests, "coordinator")["startupProbe"]["grpc"]["service"] == ""
    )  # targets may load for long


def test_gpus_of_one_pod_share_memory() -> None:
    spec = pod_of(render(GPU), "target")["spec"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in spec["volumes"]
    (mount,) = (mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "shm")
    assert mount["mountPath"] == "/dev/shm"  # noqa: S108
    assert "shm" not in json.dumps(pod_of(render(CASES["one GPU a target"]), "target"))


def test_tensor_parallelism_takes_all_gpus_unless_told_otherwise() -> None:
    assert env_of(main_container(render(GPU), "target"))["OUTRIDER_TENSOR_PARALLEL_SIZE"] == "2"
    assert env_of(main_container(render(EVERYTHING), "target"))["OUTRIDER_TENSOR_PARALLEL_SIZE"] == "4"
    assert env_of(main_container(render(SIMULATED), "target"))["OUTRIDER_TENSOR_PARALLEL_SIZE"] == "1"
    assert env_of(main_container(render(SIMULATED), "target"))["OUTRIDER_DEVICE"] == "cpu"


def test_targets_start_together_and_drafts_need_no_free_gpu_to_be_updated() -> None:
    manifests = render(GPU)
    assert named(manifests, "StatefulSet", "test-outrider-target")["spec"]["podManagementPolicy"] == "Parallel"
    update = named(manifests, "Deployment", "test-outrider-draft")["spec"]["strategy"]["rollingUpdate"]
    assert update == {"maxSurge": 0, "maxUnavailable": 1}


def test_large_numbers_arrive_as_they_were_written() -> None:
    environ = env_of(main_container(render(EVERYTHING), "coordinator"))
    assert environ["OUTRIDER_MAX_PROMPT_BYTES"] == "1000000"
    assert env_of(main_container(render(EVERYTHING), "draft"))["OUTRIDER_KV_MEMORY_SHARE"] == "0.9"
    assert env_of(main_container(render(EVERYTHING), "draft"))["OUTRIDER_COMPILE"] == "true"


def test_pools_override_only_what_they_name() -> None:
    manifests = render(CASES["several pools"])
    assert pod_of(manifests, "code-target")["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert pod_of(manifests, "large-target")["spec"]["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 2}
    environ = env_of(main_container(manifests, "coordinator"))
    assert environ["OUTRIDER_TOKENIZER"] == (
        f"acme/large=/models/acme--large/{COMMIT},acme/code=/models/acme--code/{COMMIT},mine=/models/mine"
    )
    assert re.findall(r"(\w+):\S+?=kubernetes\S*?@(\d+)", environ["OUTRIDER_DRAFTS"]) == [("large", "3"), ("code", "1")]
    assert len(of_kind(manifests, "StatefulSet")) == 4  # three targets and Redis


def test_each_model_is_downloaded_once_at_its_commit() -> None:
    (job,) = of_kind(render(CASES["several pools"]), "Job")
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert [arguments[i] for i in range(0, len(arguments), 3)] == ["acme/code", "acme/large", "acme/small"]


@pytest.mark.parametrize(
    ("case", "path"),
    [("trained head", f"/models/acme--large/{COMMIT}"), ("trained head of a directory", "/models/mine")],
)
def test_a_trained_head_finds_the_target_that_it_stands_on(case: str, path: str) -> None:
    assert env_of(main_container(render(CASES[case]), "draft"))["OUTRIDER_DRAFT_TARGET"] == path
    assert "OUTRIDER_DRAFT_TARGET" not in env_of(main_container(render(GPU), "draft"))


def test_a_draft_waits_for_no_model_that_it_does_not_load() -> None:
    manifests = render(merged(GPU, {"draft": {"drafter": "ngram", "gpu": {"count": 0}}}))
    (pod,) = [
        m["spec"]["template"]["spec"]
        for m in of_kind(manifests, "Deployment")
        if m["metadata"]["name"].endswith("-draft")
    ]
    assert "initContainers" not in pod


def test_another_model_makes_another_job() -> None:
    names = {
        of_kind(render(merged(GPU, {"target": {"revision": revision}})), "Job")[0]["metadata"]["name"]
        for revision in (COMMIT, "f" * 40)
    }
    assert len(names) == 2


def test_workers_are_kept_from_the_hub_unless_told_otherwise() -> None:
    assert env_of(main_container(render(GPU), "target"))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in env_of(main_container(render(CASES["models online"]), "target"))
    mirrored = merged(CASES["models online"], {"models": {"hubEndpoint": "http://mirror.lan:8080"}})
    for owner in ("target", "draft"):
        assert env_of(main_container(render(mirrored), owner))["HF_ENDPOINT"] == "http://mirror.lan:8080"


def test_given_accounts_are_used_and_none_is_made() -> None:
    given = {"serviceAccount": {"create": False, "coordinatorName": "reader", "workerName": "nobody"}}
    manifests = render(merged(GPU, given))
    assert not of_kind(manifests, "ServiceAccount", "Role", "RoleBinding")
    accounts = {name: pod["spec"]["serviceAccountName"] for name, pod in pods(manifests)}
    assert accounts.pop("test-outrider-coordinator") == "reader"
    assert set(accounts.values()) == {"nobody"}


def test_the_redis_password_and_models_outlive_an_uninstallation() -> None:
    manifests = render(GPU)
    for kind, name in (("Secret", "test-outrider-redis"), ("PersistentVolumeClaim", "test-outrider-models")):
        assert named(manifests, kind, name)["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not of_kind(render(CASES["everything"]), "Secret")


def test_an_upgrade_restarts_nothing_that_it_does_not_change() -> None:
    for _, pod in pods(render(GPU)):
        if "helm.sh/hook" not in pod["metadata"].get("annotations", {}):
            assert not any("helm.sh" in key or "version" in key for key in pod["metadata"]["labels"])


def test_redis_evicts_no_session() -> None:
    config = named(render(GPU), "ConfigMap", "test-outrider-redis")["data"]["redis.conf"]
    assert "maxmemory-policy noeviction" in config
    assert "appendonly yes" in config
    assert "tls-auth-clients yes" in config
    assert "port 0" in config


def test_certificates_carry_the_names_that_peers_ask_for() -> None:
    names = {m["spec"]["secretName"]: m["spec"]["dnsNames"] for m in of_kind(render(EVERYTHING), "Certificate")}
    for part in ("coordinator", "draft", "target"):
        assert part in names[f"test-outrider-{part}-tls"]
        assert not {"coordinator", "draft", "target"} - {part} & set(names[f"test-outrider-{part}-tls"])
    coordinator = names["test-outrider-coordinator-tls"]
    assert {"test-outrider-coordinator.llm.svc.cluster.local", "localhost", "llm.example.com"} <= set(coordinator)
    redis = of_kind(render(GPU), "Certificate")
    assert any("test-outrider-redis" in m["spec"].get("dnsNames", []) for m in redis)


def test_only_the_release_itself_is_trusted_without_an_issuer() -> None:
    manifests = render(GPU)
    (authority,) = (m for m in of_kind(manifests, "Certificate") if m["spec"].get("isCA"))
    issuers = {m["metadata"]["name"]: m["spec"] for m in of_kind(manifests, "Issuer")}
    leaves = [m for m in of_kind(manifests, "Certificate") if not m["spec"].get("isCA")]
    assert len(leaves) == 4
    for leaf in leaves:
        assert issuers[leaf["spec"]["issuerRef"]["name"]]["ca"]["secretName"] == authority["spec"]["secretName"]


def test_a_worker_never_sees_another_parts_certificate() -> None:
    for owner in ("draft", "target"):
        (tls,) = (v for v in pod_of(render(GPU), owner)["spec"]["volumes"] if v["name"] == "tls")
        assert tls["secret"]["secretName"] == f"test-outrider-{owner}-tls"


def test_the_dashboard_and_the_alerts_are_those_of_the_files() -> None:
    manifests = render(EVERYTHING)
    (rule,) = of_kind(manifests, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    config = named(manifests, "ConfigMap", "test-outrider-dashboard")
    assert json.loads(config["data"]["outrider.json"]) == json.loads((CHART / "files" / "dashboard.json").read_text())
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_monitor_reads_every_service_once() -> None:
    manifests = render(EVERYTHING)
    (monitor,) = of_kind(manifests, "ServiceMonitor")
    selector = monitor["spec"]["selector"]["matchLabels"]
    read = [
        named(manifests, "Service", service["metadata"]["name"])["spec"]["selector"]["app.kubernetes.io/component"]
        for service in of_kind(manifests, "Service")
        if matches(selector, service["metadata"]["labels"])
        and "metrics" in [p["name"] for p in service["spec"]["ports"]]
    ]
    assert sorted(read) == ["coordinator", "draft", "target"]


def test_connections_grow_old_so_that_clients_find_new_coordinators() -> None:
    manifests = render(merged(GPU, {"coordinator": {"maxConnectionAgeSeconds": 120}}))
    assert env_of(main_container(manifests, "coordinator"))["OUTRIDER_MAX_CONNECTION_AGE_S"] == "120"
    assert named(manifests, "Service", "test-outrider-coordinator-headless")["spec"]["clusterIP"] == "None"


def test_every_cpu_case_runs_on_images_without_cuda() -> None:
    assert main_container(render(SIMULATED), "target")["image"] == f"outrider-target:{version()}"
    assert main_container(render(GPU), "target")["image"] == f"outrider-target:{version()}-cuda"
    assert main_container(render(EVERYTHING), "target")["image"] == "registry.example.com/llm/outrider-target:9.9.9"
    pinned = merged(SIMULATED, CERT_MANAGER, {"target": {"image": {"digest": "sha256:" + "a" * 64}}})
    assert main_container(render(pinned), "target")["image"] == "outrider-target@sha256:" + "a" * 64
