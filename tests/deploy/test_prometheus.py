"""The alerts and the dashboard in a real Prometheus that scrapes real services. Skipped where it is not installed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common.metrics import metrics_endpoint
from tests.deploy.cases import EVERYTHING
from tests.deploy.chart import of_kind, render, why_no_helm
from tests.deploy.files import ALERTS, ALERTS_TEST, ONLY_WITH_A_GPU, Query, alerts, queries
from tests.integration.coordinator.conftest import TARGET, Cluster, StartCluster, start_cluster

__all__ = ["start_cluster"]

pytestmark = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="needs prometheus and promtool (Debian: prometheus)",
)

GREEDY = sampling_pb2.SamplingParams(temperature=0.0)
FIELDS = {"prompt": "x" * 50, "max_tokens": 40, "ignore_eos": True, "sampling": GREEDY}
_ADDRESS = re.compile(r'msg="Listening on" address=(\S+)')


@pytest.mark.parametrize("arguments", [("check", "rules", str(ALERTS)), ("test", "rules", str(ALERTS_TEST))])
def test_promtool_accepts_the_alerts_and_they_fire_when_they_should(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A running server."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def get(self, path: str, **arguments: str) -> Any:
        def ask() -> Any:
            with urlopen(f"http://{self._address}/api/v1/{path}?{urlencode(arguments)}", timeout=10) as response:
                return json.load(response)["data"]

        return await asyncio.to_thread(ask)

    async def is_ready(self) -> bool:
        try:
            await self.get("query", query="1")
        except OSError:  # HTTP 503 while its storage is being opened
            return False
        return True

    async def result(self, query: str) -> list[Any]:
        return list((await self.get("query", query=query))["result"])


@contextlib.asynccontextmanager
async def running_prometheus(directory: Path, ports: dict[str, int]) -> AsyncIterator[Prometheus]:
    """Scrapes every 200 ms, with the alerts as its rules."""
    jobs = [
        {
            "job_name": job,
            "static_configs": [
                # The labels that Prometheus' operator adds for a Service.
                {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "llm", "service": f"test-outrider-{job}"}}
            ],
        }
        for job, port in ports.items()
    ]
    times = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "1s"}
    config = {"global": times, "rule_files": [str(ALERTS)], "scrape_configs": jobs}
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={directory / 'prometheus.yaml'}", f"--storage.tsdb.path={directory}"]
    process = await asyncio.create_subprocess_exec(
        *command, "--web.listen-address=127.0.0.1:0", stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(20):
            while not (found := _ADDRESS.search(line := (await process.stderr.readline()).decode())):
                assert line, "prometheus ended"
        rest = asyncio.create_task(process.stderr.read())
        prometheus = Prometheus(found.group(1))
        async with asyncio.timeout(20):
            while not await prometheus.is_ready():  # noqa: ASYNC110  # another process, which tells nobody
                await asyncio.sleep(0.05)
        yield prometheus
    finally:
        process.terminate()
        await process.wait()
    await rest


def scalers_queries() -> list[Query]:
    """What KEDA asks for the workers' numbers; nothing where the chart can't be rendered."""
    return [
        Query(f"{scaler['metadata']['name']}: {trigger['name']}", trigger["metadata"]["query"])
        for scaler in ([] if why_no_helm() else of_kind(render(EVERYTHING), "ScaledObject"))
        for trigger in scaler["spec"]["triggers"]
    ]


async def load(cluster: Cluster) -> None:
    """Good and bad requests, without end."""
    for index in range(10**6):
        request = pb.GenerateRequest(**FIELDS, num_draft_tokens=4 * (index % 2), draft="" if index % 5 else "none")
        with contextlib.suppress(Exception):
            async for _ in cluster.stub.Generate(request):
                pass


async def until_answered(prometheus: Prometheus, expression: str) -> list[Any]:
    """What the query gives once it gives something that is a number; empty after 20 s."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(20):
            while True:
                result = [s for s in await prometheus.result(expression) if s["value"][1] not in ("NaN", "+Inf")]
                if result:
                    return result
                await asyncio.sleep(0.2)
    return []


@pytest.mark.slow
async def test_every_query_of_dashboard_and_scalers_and_every_alert_works_on_real_services(
    start_cluster: StartCluster, tmp_path: Path
) -> None:
    async with start_cluster(target=replace(TARGET, simulated_step_ms=3.0)) as cluster:
        assert cluster.draft is not None
        services = {"coordinator": cluster.coordinator, "target": cluster.target, "draft": cluster.draft}
        with contextlib.ExitStack() as stack:
            ports = {
                job: stack.enter_context(metrics_endpoint("127.0.0.1", 0, service.registry))
                for job, service in services.items()
            }
            loading = asyncio.create_task(load(cluster))
            async with running_prometheus(tmp_path, ports) as prometheus:
                asked = [query for query in queries() if ONLY_WITH_A_GPU not in query.expression] + scalers_queries()
                silent = [query for query in asked if not await until_answered(prometheus, query.expression)]
                rules = (await prometheus.get("rules"))["groups"]
                firing = await prometheus.result("ALERTS")
            loading.cancel()
    assert [query.panel for query in silent] == []
    checked = {rule["name"]: rule["health"] for group in rules for rule in group["rules"]}
    assert checked == {rule["alert"]: "ok" for rule in alerts()}
    assert firing == [], "a healthy cluster raises no alert"
