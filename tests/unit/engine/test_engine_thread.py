"""The thread that owns the core: batching, delivery, failure and stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry

from services.common.errors import Internal, OutriderError, ResourceExhausted, Unavailable, WorkerFailed
from services.common.items import Refused, TargetItem, TargetResult, Tokens
from services.common.rpc import GrpcServer
from services.common.values import WorkerInfo
from services.common.worker import Worker
from services.common.worker_server import RunningWorker
from services.engine.block_manager import BlockManager
from services.engine.engine_thread import EngineThread
from services.engine.simulated import SimulatedTarget
from services.engine.step import Verdict, Work
from services.target.core import TargetCore
from tests.unit.item_builders import close, decode, open_item, simulated_continuation, verify

DEADLINE_S = 10.0


class GatedTarget(SimulatedTarget):
    """A simulated target whose steps wait for permission, and fail when told to."""

    def __init__(self, blocks: BlockManager) -> None:
        super().__init__(blocks)
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.error: BaseException | None = None
        self.batches: list[int] = []

    def step(self, works: list[Work]) -> list[Verdict | None]:
        self.entered.release()
        assert self.gate.wait(DEADLINE_S)
        self.batches.append(len(works))
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().step(works)

    def open_gate(self) -> None:
        self.gate.set()


class Peer:
    """Collects what is delivered to one connection."""

    def __init__(self) -> None:
        self.deliveries: list[list[TargetResult | Refused]] = []
        self._changed = threading.Condition()

    def deliver(self, results: list[TargetResult | Refused]) -> None:
        with self._changed:
            self.deliveries.append(results)
            self._changed.notify_all()

    def results(self, num: int) -> list[TargetResult | Refused]:
        """The first `num` results, as soon as they are there."""
        with self._changed:
            assert self._changed.wait_for(lambda: sum(map(len, self.deliveries)) >= num, DEADLINE_S)
            return [result for delivery in self.deliveries for result in delivery]


class Bench:
    """An engine over a gated target, and the parts that tests look at."""

    def __init__(self, max_queued_items: int = 100) -> None:
        blocks = BlockManager(64, 4)
        self.model = GatedTarget(blocks)
        self.core = TargetCore(self.model, blocks, max_sequences=8, max_sequence_len=200, max_draft_tokens=8)
        self.engine: EngineThread[TargetItem, TargetResult] = EngineThread(self.core, "test engine", max_queued_items)

    def num_used_blocks(self) -> int:
        return self.engine.run(lambda: self.core.load.num_used_blocks, DEADLINE_S)

    def wait_for_step(self) -> None:
        assert self.model.entered.acquire(timeout=DEADLINE_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    with bench.engine:
        yield bench
        bench.model.open_gate()


def test_tokens_come_back_on_the_connection_that_asked(bench: Bench) -> None:
    bench.model.open_gate()
    first, second = Peer(), Peer()
    bench.engine.connect(first.deliver).submit([open_item("a", (1, 2)), decode("a", 2, 3)])
    bench.engine.connect(second.deliver).submit([open_item("b", (5,)), decode("b", 1, 2)])
    for peer, prefix, num in ((first, (1, 2), 3), (second, (5,), 2)):
        results = peer.results(num)
        tokens = [token for result in results if isinstance(result, Tokens) for token in result.token_ids]
        assert tuple(tokens) == simulated_continuation(prefix, num)


def test_what_is_ready_at_the_same_time_goes_into_one_step(bench: Bench) -> None:
    peers = [Peer() for _ in range(4)]
    connections = [bench.engine.connect(peer.deliver) for peer in peers]
    connections[0].submit([open_item("0"), verify("0", 3, ())])
    bench.wait_for_step()
    for number in range(1, 4):
        connections[number].submit([open_item(str(number)), verify(str(number), 3, ())])
    bench.model.open_gate()
    for peer in peers:
        peer.results(1)
    assert bench.model.batches == [1, 3]


def test_one_step_delivers_all_results_of_a_connection_together(bench: Bench) -> None:
    bench.model.open_gate()
    peer = Peer()
    items: list[TargetItem] = [open_item(name) for name in "abc"]
    bench.engine.connect(peer.deliver).submit([*items, *(verify(name, 3, ()) for name in "abc")])
    peer.results(3)
    assert [len(delivery) for delivery in peer.deliveries] == [3]
    assert bench.engine.load.num_sequences == 3


def test_refusal_does_not_wait_for_a_step(bench: Bench) -> None:
    peer = Peer()
    bench.engine.connect(peer.deliver).submit([verify("nobody", 3, ())])
    (result,) = peer.results(1)
    assert isinstance(result, Refused)
    assert bench.model.batches == []


def test_closing_a_connection_frees_its_blocks_and_ends_its_results(bench: Bench) -> None:
    peer, other = Peer(), Peer()
    connection = bench.engine.connect(peer.deliver)
    connection.submit([open_item("a"), decode("a", 3, 100)])
    bench.wait_for_step()
    bench.engine.connect(other.deliver).submit([open_item("b"), verify("b", 3, ())])
    connection.close()
    connection.close()
    bench.model.open_gate()
    other.results(1)
    assert bench.num_used_blocks() == 1
    assert peer.deliveries == []
    connection.submit([open_item("c")])
    assert bench.engine.run(lambda: bench.core.load.num_sequences, DEADLINE_S) == 1


@pytest.mark.parametrize(
    ("raised", "reason", "kind"),
    [
        (ValueError("secret prompt"), "DEFECT", Internal),
        (MemoryError(), "KV_POOL_FULL", ResourceExhausted),
        (type("OutOfMemoryError", (RuntimeError,), {})("x"), "KV_POOL_FULL", ResourceExhausted),
    ],
)
def test_failed_step_refuses_what_was_in_progress_and_the_thread_goes_on(
    bench: Bench, raised: Exception, reason: str, kind: type[OutriderError]
) -> None:
    bench.model.error = raised
    bench.model.open_gate()
    peer = Peer()
    connection = bench.engine.connect(peer.deliver)
    connection.submit([open_item("a"), verify("a", 3, ()), open_item("b"), decode("b", 3, 2)])
    refused = peer.results(2)
    for result in refused:
        assert isinstance(result, Refused)
        assert isinstance(result.error, kind)
        assert result.error.reason == reason
        assert "secret" not in result.error.message
    assert [result.identity.session_id for result in refused] == ["a", "b"]
    assert bench.num_used_blocks() == 0
    assert bench.engine.failed is None
    connection.submit([open_item("a", attempt=2), verify("a", 3, (), attempt=2)])
    assert isinstance(peer.results(3)[2], Tokens)


def test_failure_while_items_are_taken_refuses_them_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(connection: int, items: Sequence[TargetItem], arrived_ns: int | None = None) -> list[tuple[int, Tokens]]:
        raise KeyError("x")

    monkeypatch.setattr(bench.core, "handle", broken)
    peer = Peer()
    bench.engine.connect(peer.deliver).submit([open_item("a"), close("b"), open_item("c")])
    results = peer.results(2)
    assert [result.identity.session_id for result in results] == ["a", "c"]


def test_core_that_cannot_be_brought_back_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def beyond_repair(error: OutriderError) -> list[tuple[int, Tokens | Refused]]:
        raise RuntimeError("still broken")

    monkeypatch.setattr(bench.core, "abandon", beyond_repair)
    bench.model.error = ValueError("x")
    bench.engine.start()
    connection = bench.engine.connect(Peer().deliver)
    connection.submit([open_item("a"), verify("a", 3, ())])
    bench.wait_for_step()
    bench.model.open_gate()
    assert bench.engine.stop(DEADLINE_S)
    assert isinstance(bench.engine.failed, RuntimeError)
    assert "still broken" in str(bench.engine.failure.error)
    with pytest.raises(Internal):
        connection.submit([open_item("b")])


def test_a_call_behind_items_that_end_the_thread_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, queued = Bench(), threading.Event()

    def lost(*_: object) -> None:
        raise WorkerFailed("rank 1 ended")

    monkeypatch.setattr(bench.core, "handle", lost)
    bench.engine.connect(Peer().deliver).submit([open_item("a")])
    monkeypatch.setattr(bench.engine._wake, "notify", queued.set)
    with ThreadPoolExecutor() as pool:
        draining = pool.submit(bench.engine.run, bench.core.drain, DEADLINE_S)
        assert queued.wait(DEADLINE_S)
        bench.engine.start()
        draining.result()
    assert isinstance(bench.engine.failed, WorkerFailed)


def test_a_step_that_the_worker_cannot_outlive_ends_the_thread_and_is_reported() -> None:
    bench = Bench()
    bench.model.error = error = WorkerFailed("rank 1 ended")
    bench.engine.start()
    connection = bench.engine.connect(Peer().deliver)
    connection.submit([open_item("a"), verify("a", 3, ())])
    bench.wait_for_step()
    bench.model.open_gate()
    assert bench.engine.stop(DEADLINE_S)
    assert bench.engine.failure.error is error


def test_full_queue_refuses_all_but_closes() -> None:
    bench = Bench(max_queued_items=3)
    with bench.engine:
        peer = Peer()
        connection = bench.engine.connect(peer.deliver)
        connection.submit([open_item("a"), verify("a", 3, ())])
        bench.wait_for_step()
        connection.submit([open_item("b"), open_item("c")])
        assert bench.engine.load.num_queued >= 2
        with pytest.raises(ResourceExhausted) as refusal:
            connection.submit([open_item("d"), close("a"), verify("d", 3, ())])
        assert refusal.value.reason == "QUEUE_FULL"
        assert refusal.value.retry_after_ms
        connection.submit([close("b")])
        bench.model.open_gate()
        assert bench.engine.run(lambda: bench.core.load.num_sequences, DEADLINE_S) == 1


def test_full_queue_interrupts_a_decode() -> None:
    bench = Bench(max_queued_items=1)
    with bench.engine:
        peer = Peer()
        connection = bench.engine.connect(peer.deliver)
        connection.submit([open_item("a"), decode("a", 3, 90)])
        bench.wait_for_step()
        connection.submit([open_item("b")])
        connection.submit([decode("a", 3, 0)])
        bench.model.open_gate()
        first, last = peer.results(2)
        assert (first.done, last.done, last.token_ids) == (False, True, ())


def test_one_large_submission_fits_an_empty_queue() -> None:
    bench = Bench(max_queued_items=2)
    with bench.engine:
        bench.engine.connect(Peer().deliver).submit([open_item(name) for name in "abcd"])
        bench.model.open_gate()
        assert bench.engine.run(lambda: bench.core.load.num_sequences, DEADLINE_S) == 4


def test_connection_that_takes_no_results_is_closed(bench: Bench) -> None:
    def broken(results: list[TargetResult | Refused]) -> None:
        raise RuntimeError("the loop is closed")

    bench.model.open_gate()
    connection = bench.engine.connect(broken)
    connection.submit([open_item("a"), decode("a", 3, 100)])
    other = Peer()
    second = bench.engine.connect(other.deliver)
    second.submit([open_item("b"), decode("b", 3, 50)])
    other.results(50)
    assert connection.closed
    assert bench.engine.run(lambda: bench.core.load.num_sequences, DEADLINE_S) == 1


def test_run_returns_what_the_function_does_and_raises_what_it_raises(bench: Bench) -> None:
    assert bench.engine.run(threading.get_ident, DEADLINE_S) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        bench.engine.run(lambda: 1 // 0, DEADLINE_S)


def test_drained_engine_says_so_and_refuses_new_sequences(bench: Bench) -> None:
    bench.engine.drain()
    assert bench.engine.load.draining
    peer = Peer()
    bench.engine.connect(peer.deliver).submit([open_item("a")])
    (result,) = peer.results(1)
    assert isinstance(result, Refused)
    assert isinstance(result.error, Unavailable)


async def test_draining_does_not_wait_for_a_step_that_never_ends(bench: Bench) -> None:
    bench.engine.connect(Peer().deliver).submit([open_item("a"), decode("a", 3, 100)])
    bench.wait_for_step()
    info = WorkerInfo("i", "target", None, "", 16, 8, 100)
    worker = RunningWorker(0, Worker(bench.engine, info), GrpcServer("", 0), bench.engine, CollectorRegistry(), 0)
    assert not await asyncio.wait_for(worker.drain(0.01), DEADLINE_S)


def test_stop_joins_and_frees_what_was_open() -> None:
    bench = Bench()
    bench.engine.start()
    connection = bench.engine.connect(Peer().deliver)
    connection.submit([open_item("a"), decode("a", 3, 100)])
    bench.wait_for_step()
    bench.model.open_gate()
    assert bench.engine.stop(DEADLINE_S)
    assert bench.core.load.num_used_blocks == 0
    with pytest.raises(Unavailable):
        connection.submit([open_item("b")])
    with pytest.raises(Unavailable):
        bench.engine.connect(Peer().deliver)


def test_stop_tells_of_a_step_that_outlasts_the_deadline() -> None:
    bench = Bench()
    bench.engine.start()
    bench.engine.connect(Peer().deliver).submit([open_item("a"), decode("a", 3, 100)])
    bench.wait_for_step()
    assert not bench.engine.stop(0.01)
    bench.model.open_gate()
    assert bench.engine.stop(DEADLINE_S)


def test_submissions_from_many_threads_are_all_served(bench: Bench) -> None:
    bench.model.open_gate()
    futures: list[Future[int]] = [Future() for _ in range(8)]

    def serve(number: int) -> None:
        peer, name = Peer(), str(number)
        connection = bench.engine.connect(peer.deliver)
        connection.submit([open_item(name, (number,))])
        for round_number in range(10):
            connection.submit([verify(name, 1 + round_number, ())])
            peer.results(round_number + 1)
        connection.close()
        futures[number].set_result(sum(len(r.token_ids) for r in peer.results(10) if isinstance(r, Tokens)))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert [future.result(0) for future in futures] == [10] * 8
    assert bench.num_used_blocks() == 0


class HoldingCore(TargetCore):
    """Holds each step until two items wait, for `longest_s`; where that is below a second, once only."""

    longest_s = 3600.0

    @property
    def hold_s(self) -> float:
        hold_s = 0.0 if self.load.num_queued >= 2 else self.longest_s
        if self.longest_s < 1.0:
            self.longest_s = 0.0
        return hold_s


@pytest.fixture
def holding() -> Iterator[tuple[HoldingCore, EngineThread[TargetItem, TargetResult]]]:
    blocks = BlockManager(64, 4)
    core = HoldingCore(SimulatedTarget(blocks), blocks, max_sequences=8, max_sequence_len=200, max_draft_tokens=8)
    with EngineThread[TargetItem, TargetResult](core, "test engine", 100) as engine:
        yield core, engine


Holding = tuple[HoldingCore, EngineThread[TargetItem, TargetResult]]


def test_held_step_is_computed_as_soon_as_the_awaited_item_arrives(holding: Holding) -> None:
    _, engine = holding
    peer = Peer()
    connection = engine.connect(peer.deliver)
    connection.submit([open_item("a"), open_item("b"), verify("a", 3, ())])
    engine.run(lambda: None, DEADLINE_S)
    assert peer.deliveries == []
    connection.submit([verify("b", 3, ())])
    assert {result.step_rows for result in peer.results(2) if isinstance(result, Tokens)} == {2}


def test_held_step_is_computed_when_the_hold_ends_though_nothing_arrives(holding: Holding) -> None:
    core, engine = holding
    core.longest_s = 0.01
    peer = Peer()
    engine.connect(peer.deliver).submit([open_item("a"), verify("a", 3, ())])
    assert len(peer.results(1)) == 1


def test_engine_that_holds_a_step_stops_at_once(holding: Holding) -> None:
    _, engine = holding
    engine.connect(Peer().deliver).submit([open_item("a"), verify("a", 3, ())])
    engine.run(lambda: None, DEADLINE_S)
    assert engine.stop(DEADLINE_S)
