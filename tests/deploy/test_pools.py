"""Which drafts each model gets of the pools that the chart's values list, as the coordinator itself reads it."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
import yaml

from services.common.config import load
from services.coordinator.config import CoordinatorConfig
from tests.deploy.cases import CASES, COMMIT, merged
from tests.deploy.chart import CHART, Manifest, component, containers, env_of, of_kind, pods, render

pytestmark = pytest.mark.usefixtures("needs_helm")

EXAMPLE = yaml.safe_load((CHART / "ci" / "pools.yaml").read_text())
SIMULATED_TWICE = merged(
    CASES["simulated"],
    {"pools": [{"name": "chat"}, {"name": "code", "target": {"modelName": "code"}, "draft": {"drafter": "ngram"}}]},
)


def coordinator_config(manifests: list[Manifest]) -> CoordinatorConfig:
    (environ,) = (env_of(c) for _, pod in pods(manifests) for c in containers(pod) if c["name"] == "coordinator")
    return load(CoordinatorConfig, environ=environ)


def served_models(manifests: list[Manifest]) -> dict[str, str]:
    """By pool, the name that its targets tell of their model."""
    return {
        pod["metadata"]["labels"]["outrider/pool"]: environ.get("OUTRIDER_MODEL_NAME")
        or PurePosixPath(environ["OUTRIDER_MODEL"]).name
        for _, pod in pods(manifests)
        for environ in (env_of(container) for container in containers(pod) if container["name"] == "target")
    }


@pytest.mark.parametrize("values", [*CASES.values(), EXAMPLE, SIMULATED_TWICE], ids=[*CASES, "example", "twice"])
def test_each_model_gets_the_drafts_of_its_own_pools_alone(values: dict[str, object]) -> None:
    manifests = render(values)
    config, models = coordinator_config(manifests), served_models(manifests)
    drafts = [m for m in of_kind(manifests, "Deployment") if component(m) == "draft"]
    for model in models.values():
        own = {m["metadata"]["name"] for m in drafts if models[m["metadata"]["labels"]["outrider/pool"]] == model}
        serving = [pool for pool in config.draft_pools if pool.model in ("", model)]
        assert {source.host for pool in serving for source in pool.sources} == own
        assert model in config.tokenizers or "" in config.tokenizers


def test_the_example_pairs_each_model_with_its_draft() -> None:
    config = coordinator_config(render(EXAMPLE))
    assert {pool.name: (pool.model, [source.host for source in pool.sources]) for pool in config.draft_pools} == {
        "chat": ("acme/chat-70b", ["test-outrider-chat-draft"]),
        "code": ("acme/code-32b", ["test-outrider-code-draft"]),
    }


def test_two_drafts_of_one_target_share_its_requests_by_weight() -> None:
    config = coordinator_config(render(CASES["two drafts of one target"]))
    assert [(pool.name, pool.model, pool.weight) for pool in config.draft_pools] == [
        ("old", "acme/large", 9.0),
        ("new", "acme/large", 1.0),
    ]
    assert list(config.tokenizers.values()) == [f"/models/acme--large/{COMMIT}"]
