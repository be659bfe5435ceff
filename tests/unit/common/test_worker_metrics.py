"""What a worker shows at each stage of its life."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.common.tally import Watched, WorkerTally
from services.common.values import DeviceUsage, WorkerInfo, WorkerLoad
from services.common.worker_metrics import WorkerCollector

INFO = WorkerInfo("id", "draft", None, "ngram", 16, 8, 4096)


def scrape(collector: WorkerCollector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def watched(utilisation: float | None) -> Watched:
    return Watched(WorkerTally(), lambda: (0, 0), DeviceUsage, lambda: utilisation)


def test_a_worker_that_loads_says_only_that_it_is_not_ready() -> None:
    assert scrape(WorkerCollector("target")) == {"outrider_worker_ready": 0.0}


def test_a_worker_that_drains_is_not_ready_either_and_tells_all_the_same() -> None:
    collector, loads = WorkerCollector("draft"), [WorkerLoad(2, 1, 3, 4)]
    collector.set_ready(INFO, watched(None), lambda: loads[-1])
    assert scrape(collector)["outrider_worker_ready"] == 1
    loads.append(WorkerLoad(2, 1, 3, 4, draining=True))
    samples = scrape(collector)
    assert samples["outrider_worker_ready"] == 0
    assert (samples["outrider_num_sequences"], samples["outrider_kv_cache_usage_perc"]) == (2, 0.75)


def test_what_is_unknown_is_not_shown() -> None:
    collector = WorkerCollector("draft")
    collector.set_ready(INFO, watched(None), WorkerLoad)
    unknown = {"outrider_kv_cache_usage_perc", "outrider_device_memory_bytes", "outrider_device_utilisation_ratio"}
    assert not unknown & set(scrape(collector))
    collector.set_ready(INFO, watched(0.5), WorkerLoad)
    assert scrape(collector)["outrider_device_utilisation_ratio"] == 0.5
