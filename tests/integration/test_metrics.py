"""Metrics of real services: what a scrape shows after real generations."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from urllib.request import urlopen

import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.common.errors import InvalidArgument
from services.common.metrics import metrics_endpoint, new_registry
from services.common.tally import CallTally
from services.coordinator.config import CoordinatorConfig
from services.coordinator.server import running_coordinator
from services.target.server import running_target
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster, start_cluster

__all__ = ["start_cluster"]

SLOW = replace(TARGET, simulated_step_ms=3.0)
"""Long enough a step that the draft is ready before the generation has ended."""
FIELDS = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True, "sampling": sampling_pb2.SamplingParams(temperature=0)}


class Scrape:
    """The samples of one scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.samples = list(_samples(generate_latest(registry).decode()))

    def sum(self, name: str, **labels: str) -> float:
        """Over all samples that carry these labels. Raises where there is none."""
        values = [v for n, held, v in self.samples if n == "outrider_" + name and labels.items() <= held.items()]
        assert values, f"no sample of {name} with {labels}"
        return sum(values)

    @property
    def labels(self) -> set[str]:
        """All values of all labels."""
        return {value for _, held, _ in self.samples for value in held.values()}


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


async def test_counters_are_the_sums_of_what_clients_were_told(start_cluster: StartCluster) -> None:
    async with start_cluster(target=SLOW) as cluster:
        speculative = [await cluster.generate(**FIELDS, num_draft_tokens=4) for _ in range(3)]
        plain = await cluster.generate(**FIELDS, num_draft_tokens=0)
        scrape = Scrape(cluster.coordinator.registry)
    told = [result.finished.statistics for result in speculative]
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        expected = sum(getattr(statistics, name) for statistics in told)
        assert scrape.sum(f"spec_decode_{name}_total", draft="default") == expected > 0
    for position in range(max(len(statistics.num_accepted_tokens_per_pos) for statistics in told)):
        expected = sum((*statistics.num_accepted_tokens_per_pos, 0, 0, 0)[position] for statistics in told)
        labels = {"position": str(position), "model_name": "simulated"}
        assert scrape.sum("spec_decode_num_accepted_tokens_per_pos_total", **labels) == expected
    num_plain = sum(s.num_rounds - len(s.rounds) for s in (*told, plain.finished.statistics))
    assert scrape.sum("rounds_total", type="plain") == num_plain
    assert scrape.sum("rounds_total", type="speculative") == sum(len(s.rounds) for s in told)
    assert scrape.sum("generation_tokens_total") == 160
    assert scrape.sum("prompt_tokens_total") == 4 * told[0].num_prompt_tokens
    assert scrape.sum("request_success_total", finished_reason="length") == 4
    assert scrape.sum("time_to_first_token_seconds_count") == scrape.sum("e2e_request_latency_seconds_count") == 4
    assert scrape.sum("time_per_output_token_seconds_count") == 4
    total_s = sum(s.total_ms for s in (*told, plain.finished.statistics)) / 1e3
    assert scrape.sum("e2e_request_latency_seconds_sum") == pytest.approx(total_s, rel=0.05)
    assert scrape.sum("cpu_seconds_total", role="coordinator") > 0


async def test_a_worker_counts_its_steps_tokens_and_cache(start_cluster: StartCluster) -> None:
    prompt = {**FIELDS, "prompt": "x" * 100}
    async with start_cluster(target=SLOW) as cluster:
        assert cluster.draft is not None
        [*results] = [await cluster.generate(**prompt, num_draft_tokens=4) for _ in range(2)]
        target, draft = Scrape(cluster.target.registry), Scrape(cluster.draft.registry)
        activity = cluster.target.worker.activity()
    assert target.sum("worker_tokens_total", role="target", model_name="simulated") >= 80
    assert target.sum("worker_tokens_total") == activity.num_tokens
    assert target.sum("step_duration_seconds_count") == target.sum("step_sequences_count") == activity.num_steps > 0
    assert target.sum("step_rows_sum") > target.sum("step_sequences_sum") > 0
    assert target.sum("prefix_cache_queries_total") > target.sum("prefix_cache_hits_total") >= 96
    assert target.sum("kv_cache_usage_perc") == target.sum("kv_cache_blocks_used") / target.sum("kv_cache_blocks")
    assert target.sum("device_memory_bytes") > target.sum("device_memory_used_bytes") > 0
    assert target.sum("worker_ready") == draft.sum("worker_ready") == 1
    drafted = sum(result.finished.statistics.num_draft_tokens for result in results)
    assert draft.sum("worker_tokens_total") >= drafted > 0
    assert draft.sum("queue_time_seconds_count") > 0


async def test_refusals_are_counted_by_code_and_reason_and_no_label_grows_with_the_sessions(
    start_cluster: StartCluster,
) -> None:
    async with start_cluster() as cluster:
        sessions = {(await cluster.generate(**FIELDS)).started.session_id for _ in range(3)}
        before = len(Scrape(cluster.coordinator.registry).samples)
        sessions |= {(await cluster.generate(**FIELDS)).started.session_id for _ in range(3)}
        for _ in range(2):
            with pytest.raises(InvalidArgument):
                await cluster.generate(**FIELDS | {"max_tokens": 1 << 30})
        await cluster.stub.ListModels(pb.ListModelsRequest())
        scrape = Scrape(cluster.coordinator.registry)
        workers = Scrape(cluster.target.registry)
    refused = {"method": "Generate", "code": "INVALID_ARGUMENT", "reason": "INVALID_PARAMETER"}
    assert scrape.sum("requests_total", **refused) == 2
    assert scrape.sum("requests_total", method="Generate", code="OK") == 6
    assert scrape.sum("requests_total", method="ListModels", code="OK") == 1
    assert workers.sum("requests_total", method="GetWorkerInfo", code="OK") == 1
    assert not sessions & (scrape.labels | workers.labels)
    new_calls, new_positions = 2, 32
    assert len(scrape.samples) <= before + new_calls + new_positions


async def test_a_coordinator_tells_which_workers_are_gone(start_cluster: StartCluster) -> None:
    async with start_cluster(drafts="ngram=127.0.0.1:1") as cluster:
        scrape = Scrape(cluster.coordinator.registry)
    assert scrape.sum("worker_up", worker_role="target") == 1
    assert scrape.sum("worker_up", worker_role="draft", pool="ngram") == 0
    assert (scrape.sum("workers", worker_role="draft"), scrape.sum("workers_up", worker_role="draft")) == (1, 0)
    assert scrape.sum("num_requests_running") == scrape.sum("num_requests_waiting") == 0


async def test_a_running_generation_is_seen(cluster: Cluster) -> None:
    call = cluster.stub.Generate(pb.GenerateRequest(**FIELDS | {"max_tokens": 30_000}))
    await call.read()
    while not (await call.read()).token_ids:
        pass
    scrape = Scrape(cluster.coordinator.registry)
    call.cancel()
    assert (scrape.sum("num_requests_running"), scrape.sum("num_requests_waiting")) == (1, 0)
    assert scrape.sum("generation_tokens_total") > 0


async def test_the_clusters_status_tells_of_the_coordinator_and_of_each_worker(start_cluster: StartCluster) -> None:
    async with start_cluster(target=SLOW) as cluster:
        assert cluster.draft is not None
        told = (await cluster.generate(**FIELDS, num_draft_tokens=4)).finished.statistics
        status = await cluster.stub.GetClusterStatus(pb.GetClusterStatusRequest())
    assert (status.activity.num_generated_tokens, status.activity.num_drafts) == (40, told.num_drafts)
    assert (status.activity.num_calls, status.activity.num_failed_calls) == (1, 0)
    assert [(worker.address, worker.pool, worker.up) for worker in status.workers] == [
        (f"127.0.0.1:{cluster.target.port}", "", True),
        (f"127.0.0.1:{cluster.draft.port}", "default", True),
    ]
    assert [worker.info.activity.num_tokens > 0 for worker in status.workers] == [True, True]
    assert status.drafts[0].num_accepted_tokens == told.num_accepted_tokens


@pytest.fixture
async def cluster(start_cluster: StartCluster):
    async with start_cluster() as running:
        yield running


async def test_the_endpoints_of_all_services_answer_over_http(redis_url: str) -> None:
    def get(port: int) -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            return str(response.read().decode())

    async with running_target(TARGET, metrics_port=0) as target:
        config = CoordinatorConfig(
            port=0, redis_url=redis_url, tokenizer="simulated", targets=f"127.0.0.1:{target.port}"
        )
        async with running_coordinator(config, metrics_port=0) as coordinator:
            assert await coordinator.wait_ready(10)
            texts = [await asyncio.to_thread(get, running.metrics_port) for running in (target, coordinator)]
    assert 'outrider_worker_ready{model_name="simulated",role="target"} 1.0' in texts[0]
    assert 'outrider_workers_up{role="coordinator",worker_role="target"} 1.0' in texts[1]
    assert all("process_resident_memory_bytes" in text for text in texts)
    version = importlib.metadata.version("outrider")
    for text, role in zip(texts, ("target", "coordinator"), strict=True):
        assert f'outrider_build_info{{protocol_version="1",role="{role}",version="{version}"}} 1.0' in text


def test_a_taken_metrics_port_stops_the_start_with_the_settings_name() -> None:
    registry = new_registry(CallTally(), {})
    with (
        metrics_endpoint("127.0.0.1", 0, registry) as port,
        pytest.raises(OSError, match="metrics_port: cannot listen"),
        metrics_endpoint("127.0.0.1", port, registry),
    ):
        pass
