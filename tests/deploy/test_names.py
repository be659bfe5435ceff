"""The dashboard, the alerts and the documentation speak of metrics that real services have, and of all of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from outrider.v1 import sampling_pb2
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.common import metrics as common_metrics
from services.common import worker_metrics
from services.common.metrics import PREFIX, Family
from services.coordinator import metrics as coordinator_metrics
from tests.deploy.files import ALERTS, ALERTS_TEST, DOCS, ONLY_WITH_A_GPU, alerts, dashboard, names_in, queries
from tests.integration.coordinator.conftest import TARGET, StartCluster, start_cluster

__all__ = ["start_cluster"]

GREEDY = sampling_pb2.SamplingParams(temperature=0.0)
HISTOGRAM_SUFFIXES = ("_bucket", "_sum", "_count")


async def test_every_metric_of_the_dashboard_and_the_alerts_is_in_a_scrape_of_real_services(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=3.0)) as cluster:
        assert cluster.draft is not None
        for num_draft_tokens in (4, 0):
            await cluster.generate(
                prompt="x" * 50, max_tokens=40, ignore_eos=True, sampling=GREEDY, num_draft_tokens=num_draft_tokens
            )
        registries = [service.registry for service in (cluster.coordinator, cluster.target, cluster.draft)]
        text = "".join(generate_latest(registry).decode() for registry in registries)
    scraped = {s.name for family in text_string_to_metric_families(text) for s in family.samples}
    named = {query.panel: names_in(query.expression) for query in queries()}
    named |= {rule["alert"]: names_in(rule["expr"]) for rule in alerts()}
    assert all(named.values())
    unknown = {where: names - scraped - {ONLY_WITH_A_GPU} for where, names in named.items()}
    assert {where: names for where, names in unknown.items() if names} == {}


def families() -> list[Family]:
    """All that the collectors know."""
    found = [entry.family for entry in (*coordinator_metrics.COUNTERS, *coordinator_metrics.HISTOGRAMS)]
    for module in (common_metrics, worker_metrics, coordinator_metrics):
        found += [value for value in vars(module).values() if isinstance(value, Family)]
    return found


def test_no_two_metrics_share_a_name() -> None:
    names = [family.name for family in families()]
    assert len(set(names)) == len(names) > 35


def test_the_documentation_has_every_metric_once_and_no_other() -> None:
    documented = re.findall(r"^\| `(outrider_\w+)` \|", DOCS.read_text(), re.MULTILINE)
    assert len(set(documented)) == len(documented)
    assert {name.removesuffix("_total") for name in documented} == {PREFIX + family.name for family in families()}


def test_the_documentation_has_every_alert() -> None:
    documented = re.findall(r"^\| `(Outrider\w+)` \|", DOCS.read_text(), re.MULTILINE)
    assert documented == [rule["alert"] for rule in alerts()]


def test_every_alert_says_how_bad_it_is_and_what_to_do_and_has_a_test() -> None:
    tested = ALERTS_TEST.read_text()
    for rule in alerts():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
        assert f"- alertname: {rule['alert']}\n" in tested, f"{rule['alert']} never fires in a test"
    assert "\t" not in ALERTS.read_text()


def test_the_dashboards_panels_lie_side_by_side_and_ask_the_chosen_data_source() -> None:
    document = dashboard()
    panels, taken = document["panels"], set[tuple[int, int]]()
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in _rows(place)}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"] in ("short", "percentunit", "s", "reqps")
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert {variable["name"] for variable in document["templating"]["list"]} == {"datasource", "job", "model_name"}


def _rows(place: dict[str, int]) -> range:
    return range(place["y"], place["y"] + place["h"])


@pytest.mark.parametrize("query", queries(), ids=lambda query: query.panel)
def test_no_variable_is_left_in_a_query(query) -> None:
    assert "$" not in query.expression
