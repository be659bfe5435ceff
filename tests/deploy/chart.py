"""The chart as the tests see it: values in, manifests or a refusal out."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.tools.fetch import ToolsUnavailable, program

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "outrider"
NAMESPACE = "llm"
RELEASE = "test"
Manifest = dict[str, Any]

APIS = (
    "cert-manager.io/v1/Certificate",
    "gateway.networking.k8s.io/v1/GRPCRoute",
    "keda.sh/v1alpha1/ScaledObject",
    "monitoring.coreos.com/v1/PrometheusRule",
    "monitoring.coreos.com/v1/ServiceMonitor",
)
"""What a cluster with all operators has beside Kubernetes' own."""


class Refused(Exception):
    """The chart does not render; the text is what helm says."""


def why_no_helm() -> str:
    """Empty where helm can be run."""
    try:
        program("helm")
    except ToolsUnavailable as error:
        return str(error)
    return ""


def render(values: Mapping[str, Any], apis: tuple[str, ...] = APIS, release: str = RELEASE) -> list[Manifest]:
    """All manifests of an installation. Raises Refused."""
    return [json.loads(text) for text in _render(json.dumps(values, sort_keys=True), apis, release)]


@functools.cache
def _render(values: str, apis: tuple[str, ...], release: str) -> tuple[str, ...]:
    output = _helm(values, *(f"--api-versions={api}" for api in apis), release=release)
    return tuple(json.dumps(manifest) for manifest in yaml.load_all(output, yaml.CSafeLoader) if manifest)


def notes(values: Mapping[str, Any]) -> str:
    """What an installation prints: an installation without a cluster can't be told of operators, a rendering can."""
    return _notes(json.dumps(values, sort_keys=True))


@functools.cache
def _notes(values: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        chart = Path(shutil.copytree(CHART, Path(folder) / "chart"))
        (chart / "templates" / "notes.yaml").write_text(_NOTES)
        options = ("--show-only=templates/notes.yaml", *(f"--api-versions={api}" for api in APIS))
        return str(yaml.safe_load(_helm(values, *options, chart=chart))["text"])


_NOTES = 'kind: Notes\ntext: {{ include (print .Template.BasePath "/NOTES.txt") . | toJson }}\n'


def _helm(values: str, *options: str, chart: Path = CHART, release: str = RELEASE) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(values)
        file.flush()
        arguments = ["template", release, str(chart), "--namespace", NAMESPACE, "--values", file.name, *options]
        done = subprocess.run([program("helm"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


# --- Reading manifests ------------------------------------------------------------------------------------------------


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The one of that kind and name."""
    (found,) = (m for m in of_kind(manifests, kind) if m["metadata"]["name"] == name)
    return found


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod that would run, as (name of its owner, {"metadata", "spec"})."""
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield manifest["metadata"]["name"], manifest["spec"]["template"]
        elif manifest["kind"] == "Pod":
            yield manifest["metadata"]["name"], manifest


def containers(pod: Manifest) -> list[Manifest]:
    """Of a pod, those that initialise included."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def env_of(container: Manifest) -> dict[str, str]:
    """A container's variables; those from a Secret are `secret`, and $(NAME) is replaced as Kubernetes does."""
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        value = variable.get("value", "secret")
        for name, known in values.items():
            value = value.replace(f"$({name})", known)
        values[variable["name"]] = value
    return values


def component(manifest: Manifest) -> str:
    return str(manifest["metadata"]["labels"]["app.kubernetes.io/component"])


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether `labels` has all of a selector's matchLabels."""
    return all(labels.get(key) == value for key, value in selector.items())
