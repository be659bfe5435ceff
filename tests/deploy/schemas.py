"""Kubernetes' own schemas for manifests, strict: an unknown field is an error. Kinds of operators have none here."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jsonschema
from referencing import Registry, Resource

from deploy.tools.fetch import SCHEMAS, fetch
from tests.deploy.chart import Manifest

VERSIONS = ("v1.27", "v1.33", "v1.37")
"""The oldest that the chart admits, one between, the newest known."""
OPERATORS = (
    "cert-manager.io/v1",
    "gateway.networking.k8s.io/v1",
    "keda.sh/v1alpha1",
    "monitoring.coreos.com/v1",
)


def errors(manifest: Manifest, version: str) -> list[str]:
    """What Kubernetes `version` would refuse in it."""
    if manifest["apiVersion"] in OPERATORS:
        return []
    validator = _validator(version, manifest["kind"].lower(), _file_version(manifest["apiVersion"]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def _file_version(api_version: str) -> str:
    """apps/v1 is apps-v1; rbac.authorization.k8s.io/v1 is rbac-v1."""
    group, slash, version = api_version.rpartition("/")
    return f"{group.partition('.')[0]}-{version}" if slash else version


@functools.cache
def _validator(version: str, kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    folder = fetch(SCHEMAS) / version
    schema = json.loads((folder / f"{kind}-{api_version}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=_registry(folder))


@functools.cache
def _registry(folder: Path) -> Registry[object]:
    definitions: Resource[object] = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return definitions @ Registry()
