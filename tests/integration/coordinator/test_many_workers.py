"""Several targets and drafts behind one coordinator, with real servers: spread, returned to, lost, stalled, drained."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from outrider.v1 import coordinator_pb2 as pb
from outrider.v1 import sampling_pb2

from services.common import rpc
from services.common.errors import InvalidArgument, Unavailable
from services.common.service import wait_until
from services.common.session_store import SessionStore
from services.common.worker_server import RunningWorker
from services.coordinator.rendezvous import LOAD_FACTOR
from tests.fakes.kubernetes_api import KubernetesApi, endpoint_slice, kubeconfig
from tests.fakes.tcp_proxy import proxied
from tests.integration.coordinator.conftest import DRAFT, TARGET, ManyWorkers, Model, Result, StartMany, start_target

SLOW = replace(TARGET, simulated_step_ms=5.0)
GREEDY = sampling_pb2.SamplingParams(temperature=0.0)
SAMPLED = sampling_pb2.SamplingParams(temperature=1.0, seed=7)


def fields(**more: Any) -> dict[str, Any]:
    return {"max_tokens": 120, "ignore_eos": True, "sampling": SAMPLED, **more}


async def kill(worker: RunningWorker) -> None:
    """Its connections break and its port is closed, at once."""
    await worker.server._server.stop(None)


def holding(workers: Sequence[RunningWorker]) -> list[RunningWorker]:
    """Those with sequences."""
    return [worker for worker in workers if worker.engine.load.num_sequences]


async def one_holds(workers: Sequence[RunningWorker]) -> RunningWorker:
    """The worker that a sequence is open on."""
    assert await wait_until(lambda: bool(holding(workers)), 10, 0.002)
    return holding(workers)[0]


async def prompts_of(cluster: ManyWorkers, **more: Any) -> tuple[dict[str, list[int]], list[str]]:
    """What some prompts give undisturbed, by prompt."""
    prompts = [f"prompt {n}" for n in range(6)]
    plain = [cluster.generate(**fields(prompt=p, num_draft_tokens=0, **more)) for p in prompts]
    return {p: result.tokens for p, result in zip(prompts, await asyncio.gather(*plain), strict=True)}, prompts


@asynccontextmanager
async def stalled(worker: RunningWorker) -> AsyncIterator[None]:
    """Its engine computes nothing, its connections live."""
    release = threading.Event()
    waiting = asyncio.create_task(asyncio.to_thread(worker.engine.run, release.wait))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        release.set()
        await waiting


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
async def test_a_target_killed_midway_costs_a_pause_and_no_token(
    start_many: StartMany, sampling: sampling_pb2.SamplingParams
) -> None:
    async with start_many([SLOW, SLOW], [DRAFT]) as cluster:
        whole, prompts = await prompts_of(cluster, sampling=sampling)
        running = [asyncio.create_task(cluster.generate(**fields(prompt=p, sampling=sampling))) for p in prompts]
        assert await wait_until(lambda: len(holding(cluster.targets)) == 2, 10, 0.002)
        await kill(cluster.targets[0])
        assert [(await task).tokens for task in running] == list(whole.values())
        assert (await cluster.generate(**fields(prompt=prompts[0], sampling=sampling))).tokens == whole[prompts[0]]
        assert await wait_until(lambda: not holding(cluster.targets[1:]), 10)


async def test_a_killed_draft_is_replaced_by_another_while_the_target_goes_on(start_many: StartMany) -> None:
    async with start_many([SLOW], [DRAFT, DRAFT]) as cluster:
        whole = await cluster.generate(**fields(prompt="a", num_draft_tokens=0, max_tokens=400))
        running = asyncio.create_task(cluster.generate(**fields(prompt="a", num_draft_tokens=4, max_tokens=400)))
        first = await one_holds(cluster.drafts)
        [other] = [draft for draft in cluster.drafts if draft is not first]
        await kill(first)
        assert await wait_until(lambda: other.engine.load.num_sequences == 1, 10, 0.002)
        assert not running.done()
        assert (await running).tokens == whole.tokens


async def test_a_stalled_target_is_left_after_its_deadline(start_many: StartMany) -> None:
    async with start_many([SLOW, SLOW], [DRAFT], target_timeout_s=2.0) as cluster:  # more than a busy machine's pauses
        whole, prompts = await prompts_of(cluster)
        running = [asyncio.create_task(cluster.generate(**fields(prompt=p))) for p in prompts]
        assert await wait_until(lambda: len(holding(cluster.targets)) == 2, 10, 0.002)
        async with stalled(cluster.targets[0]):
            assert [(await task).tokens for task in running] == list(whole.values())


async def test_a_stalled_draft_is_replaced_and_its_late_answer_changes_nothing(start_many: StartMany) -> None:
    async with start_many([SLOW], [DRAFT, DRAFT], propose_timeout_s=60.0) as cluster:
        whole = await cluster.generate(**fields(prompt="a", num_draft_tokens=0, max_tokens=600))
        running = asyncio.create_task(cluster.generate(**fields(prompt="a", num_draft_tokens=4, max_tokens=600)))
        first = await one_holds(cluster.drafts)
        [other] = [draft for draft in cluster.drafts if draft is not first]
        [served] = cluster.coordinator.placement.served
        counts = served.drafts[0].share(served.model.name).counts
        assert await wait_until(lambda: counts.num_drafts >= 5, 10, 0.002)  # what is usual is known
        async with stalled(first):
            assert await wait_until(lambda: other.engine.load.num_sequences == 1, 10, 0.002)
        assert await wait_until(lambda: not holding([first]), 5)
        assert not running.done()
        assert (await running).tokens == whole.tokens


async def test_a_draining_target_gets_nothing_new_and_what_it_has_is_moved(start_many: StartMany) -> None:
    async with start_many([SLOW, SLOW], [DRAFT]) as cluster:
        whole, prompts = await prompts_of(cluster)
        running = [asyncio.create_task(cluster.generate(**fields(prompt=p))) for p in prompts]
        assert await wait_until(lambda: len(holding(cluster.targets)) == 2, 10, 0.002)
        drained = cluster.targets[0]
        assert await drained.drain(5)
        assert not any(task.done() for task in running)
        assert [(await task).tokens for task in running] == list(whole.values())
        for n in range(8):
            await cluster.generate(**fields(prompt=f"more {n}", max_tokens=2))
        assert drained.engine.load.num_sequences == 0


async def test_plain_decoding_moves_from_a_draining_target_as_well(start_many: StartMany) -> None:
    async with start_many([SLOW, SLOW], []) as cluster:
        whole = await cluster.generate(**fields(prompt="a", max_tokens=300))
        running = asyncio.create_task(cluster.generate(**fields(prompt="a", max_tokens=300)))
        assert await (await one_holds(cluster.targets)).drain(5)
        assert not running.done()
        assert (await running).tokens == whole.tokens


async def test_a_draining_draft_hands_its_sessions_to_another(start_many: StartMany) -> None:
    async with start_many([SLOW], [DRAFT, DRAFT]) as cluster:
        running = asyncio.create_task(cluster.generate(**fields(prompt="a", num_draft_tokens=4, max_tokens=400)))
        first = await one_holds(cluster.drafts)
        assert await first.drain(5)
        assert not running.done()
        assert await wait_until(lambda: len(holding(cluster.drafts)) == 1, 10, 0.002)
        await running


async def test_the_only_target_serves_its_rounds_to_the_end_while_it_drains(start_many: StartMany) -> None:
    async with start_many([SLOW], []) as cluster:
        running = asyncio.create_task(cluster.generate(**fields(prompt="a")))
        await one_holds(cluster.targets)
        assert await cluster.target.drain(10)
        assert len((await running).tokens) == 120
        with pytest.raises(Unavailable) as caught:
            await cluster.generate(**fields(prompt="b"))
        assert caught.value.reason == "DRAINING"


async def test_load_spreads_over_all_workers_within_the_bound(start_many: StartMany) -> None:
    async with start_many([SLOW] * 3, [DRAFT] * 2) as cluster:
        calls = [
            cluster.stub.Generate(
                pb.GenerateRequest(**fields(prompt=f"number {n}", max_tokens=5000, num_draft_tokens=2))
            )
            for n in range(30)
        ]
        await asyncio.gather(*[call.read() for call in calls])
        assert await wait_until(lambda: sum(w.engine.load.num_sequences for w in cluster.workers) == 60, 10, 0.01)
        loads = [[worker.engine.load.num_sequences for worker in kind] for kind in (cluster.targets, cluster.drafts)]
        for call in calls:
            call.cancel()
    assert max(loads[0]) <= LOAD_FACTOR * 30 / 3 + 1
    assert max(loads[1]) <= LOAD_FACTOR * 30 / 2 + 1


async def test_equal_prefixes_meet_on_one_target(start_many: StartMany) -> None:
    prefix = "a long system prompt, the same for everybody " * 10
    async with start_many([TARGET] * 4, []) as cluster:
        handles = {
            await target_of(cluster, await cluster.generate(**fields(prompt=f"{prefix}{n}", max_tokens=2)))
            for n in range(6)
        }
        others = {
            await target_of(cluster, await cluster.generate(**fields(prompt=f"{n}{prefix}", max_tokens=2)))
            for n in range(12)
        }
    assert len(handles) == 1
    assert len(others) > 1


async def target_of(cluster: ManyWorkers, result: Result) -> str:
    return (await handles_of(cluster, result.started.session_id))[0]


async def handles_of(cluster: ManyWorkers, session_id: str) -> tuple[str, str]:
    """The instances that the record names."""
    store: SessionStore = cluster.coordinator.coordinator._store
    record = await store.load(session_id)
    assert record is not None
    assert record.target_handle is not None
    return record.target_handle.instance_id, record.draft_handle.instance_id if record.draft_handle else ""


async def test_a_next_turn_returns_to_the_workers_that_have_the_cache(start_many: StartMany) -> None:
    async with start_many([TARGET] * 4, [DRAFT] * 4) as cluster:
        for number in range(5):
            session_id = str(uuid.uuid4())
            visited = set()
            for turn in range(4):
                prompt = f"session {number}, turn {turn}. "
                await cluster.generate(**fields(session_id=session_id, prompt=prompt, max_tokens=8, num_draft_tokens=2))
                visited.add(await handles_of(cluster, session_id))
            assert len(visited) == 1


@pytest.mark.parametrize("changes", [{"digest": "another"}, {"dtype": "bfloat16"}, {"noise_version": 99}])
async def test_a_target_that_computes_otherwise_is_refused_and_gets_no_moved_generation(
    start_many: StartMany, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    same, other = [SLOW, SLOW], Model(SLOW, changes)
    async with start_many([*same, other], [], target_retry_s=0.5) as cluster:
        running = [asyncio.create_task(cluster.generate(**fields(prompt=str(n), max_tokens=400))) for n in range(8)]
        assert await wait_until(lambda: len(holding(cluster.targets)) == 2, 10, 0.002)
        for target in cluster.targets[:2]:
            await kill(target)
        results = await asyncio.gather(*running, return_exceptions=True)
        assert not holding(cluster.targets[2:])
    assert {type(result) for result in results} == {Unavailable}
    assert f"{next(iter(changes))} {next(iter(changes.values()))} instead of" in caplog.text


OUT_OF_MEMORY = [
    pytest.param(2, 0, "targets", 1, id="one of two targets once"),
    pytest.param(2, 0, "targets", None, id="one of two targets for ever"),
    pytest.param(1, 0, "targets", 1, id="the only target once"),
    pytest.param(1, 0, "targets", 4, id="the only target four times"),
    pytest.param(1, 1, "drafts", None, id="the only draft for ever"),
]


@pytest.mark.parametrize(("num_targets", "num_drafts", "kind", "num_failures"), OUT_OF_MEMORY)
async def test_a_worker_without_memory_costs_a_pause_and_no_token(
    start_many: StartMany, num_targets: int, num_drafts: int, kind: str, num_failures: int | None
) -> None:
    async with start_many([SLOW] * num_targets, [DRAFT] * num_drafts) as cluster:
        whole, prompts = await prompts_of(cluster, max_tokens=200)
        more = {"max_tokens": 200, "num_draft_tokens": 4 * num_drafts}
        running = [asyncio.create_task(cluster.generate(**fields(prompt=p, **more))) for p in prompts]
        workers: Sequence[RunningWorker] = getattr(cluster, kind)
        coordinator = cluster.coordinator.coordinator
        assert await wait_until(lambda: coordinator.num_streaming == len(prompts), 10, 0.002)
        assert len(holding(workers)) == len(workers)
        failures = run_out_of_memory(workers[0], num_failures)
        assert await wait_until(lambda: len(failures) >= (num_failures or 1), 10, 0.002)
        assert not any(task.done() for task in running)
        assert [(await task).tokens for task in running] == list(whole.values())
        assert await wait_until(lambda: not holding(cluster.workers), 10)


def run_out_of_memory(worker: RunningWorker, num_failures: int | None) -> list[MemoryError]:
    """Its next steps fail; None: all of them do. Returns those failures, as they come."""
    core = worker.engine._core  # type: ignore[attr-defined]
    failures: list[MemoryError] = []
    step = core.step

    def failing_step() -> Any:
        if num_failures is None or len(failures) < num_failures:
            failures.append(MemoryError())
            raise failures[-1]
        return step()

    core.step = failing_step
    return failures


async def test_models_are_chosen_by_name_and_generations_stay_with_theirs(start_many: StartMany) -> None:
    one, two = (replace(SLOW, model_name=name) for name in ("one", "two"))
    async with start_many([one, two], [DRAFT], tokenizer="one=simulated,two=simulated") as cluster:
        models = (await cluster.stub.ListModels(pb.ListModelsRequest())).models
        assert [(model.name, model.ready) for model in models] == [("one", True), ("two", True)]
        with pytest.raises(InvalidArgument, match="name one of one, two") as caught:
            await cluster.generate(**fields(prompt="a"))
        assert caught.value.field == "model"
        for name, target, other in (("one", *cluster.targets), ("two", *reversed(cluster.targets))):
            running = [asyncio.create_task(cluster.generate(**fields(prompt=f"{n}", model=name))) for n in range(6)]
            assert await wait_until(lambda target=target: target.engine.load.num_sequences == 6, 10, 0.002)
            assert not holding([other])
            assert {(await task).started.model for task in running} == {name}
        await kill(cluster.targets[0])
        with pytest.raises(Unavailable):
            await cluster.generate(**fields(prompt="a", model="one"))
        assert len((await cluster.generate(**fields(prompt="a", model="two"))).tokens) == 120


async def test_a_half_open_connection_is_noticed_by_keepalive(
    start_many: StartMany, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenth = [(name, value // 10 if name.endswith("_ms") else value) for name, value in rpc._KEEPALIVE]
    monkeypatch.setattr(rpc, "_KEEPALIVE", tenth)
    async with start_target(SLOW) as hidden, proxied("127.0.0.1", hidden.port) as proxy, start_target(SLOW) as plain:
        addresses = f"127.0.0.1:{proxy.port},127.0.0.1:{plain.port}"
        async with start_many([SLOW], [], targets=addresses) as cluster:
            prompts = [f"prompt {n}" for n in range(6)]
            running = [asyncio.create_task(cluster.generate(**fields(prompt=p))) for p in prompts]
            assert await wait_until(lambda: bool(holding([hidden])), 10, 0.002)
            proxy.silence()
            async with asyncio.timeout(10):
                results = [await task for task in running]
            whole = [await cluster.generate(**fields(prompt=p)) for p in prompts]
    assert [result.tokens for result in results] == [result.tokens for result in whole]


async def test_targets_join_and_leave_as_the_endpoint_slices_say(
    start_many: StartMany, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slice_of(name: str, worker: RunningWorker, **conditions: bool) -> dict[str, Any]:
        ports = [{"name": "grpc", "port": worker.port}]
        return endpoint_slice(name, "127.0.0.1", service="targets", ports=ports, **conditions)

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with KubernetesApi().serving() as api:
        (tmp_path / "config").write_text(kubeconfig(api.url))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        async with start_target(SLOW) as old, start_target(SLOW) as new:
            api.apply(slice_of("old", old))
            source = "kubernetes://ns/targets:grpc"
            async with start_many([SLOW], [], targets=source, insecure=True) as cluster:
                running = asyncio.create_task(cluster.generate(**fields(prompt="a", max_tokens=600)))
                assert await one_holds([old])
                api.apply(slice_of("new", new))
                api.apply(slice_of("old", old, ready=False, serving=True, terminating=True))
                assert await wait_until(lambda: holding([old, new]) == [new], 10, 0.002)
                api.delete("old")
                assert not running.done()
                moved = await running
                whole = await cluster.generate(**fields(prompt="a", max_tokens=600))
    assert moved.tokens == whole.tokens
