"""Every manifest of every set of values is what Kubernetes expects."""

from __future__ import annotations

import pytest

from tests.deploy.cases import CASES
from tests.deploy.chart import of_kind, render
from tests.deploy.schemas import OPERATORS, VERSIONS, errors

pytestmark = pytest.mark.usefixtures("needs_helm")


@pytest.mark.parametrize("case", CASES)
def test_manifests_have_the_form_that_kubernetes_expects(case: str) -> None:
    for version in VERSIONS:
        for manifest in render(CASES[case]):
            assert not errors(manifest, version), f"{version}: {manifest['kind']} {manifest['metadata']['name']}"


def test_a_misspelt_field_would_be_noticed() -> None:
    (deployment, *_) = of_kind(render(CASES["simulated"]), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    assert all("readinesProbe" in " ".join(errors(deployment, version)) for version in VERSIONS)


def test_every_kind_is_checked_or_an_operators() -> None:
    kinds = {m["apiVersion"] for case in CASES.values() for m in render(case)}
    assert set(OPERATORS) <= kinds
