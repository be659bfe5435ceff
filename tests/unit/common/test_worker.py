"""How one stream of items ends."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from services.common.errors import Aborted, Internal, ResourceExhausted
from services.common.items import Identity, Tokens
from services.common.values import WorkerInfo, WorkerLoad
from services.common.wire import MAX_ITEMS_A_MESSAGE, MAX_UNREAD_RESULTS
from services.common.worker import ItemStream, Worker, WorkerState


class IdleEngine:
    """Takes items and never answers."""

    load = WorkerLoad()

    def __init__(self) -> None:
        self.num_closed = 0

    def connect(self, deliver: Callable[[list[Any]], None]) -> IdleEngine:
        return self

    def submit(self, items: Sequence[Any], arrived_ns: int) -> None:
        pass

    def close(self) -> None:
        self.num_closed += 1


async def requests() -> AsyncIterator[str]:
    yield "request"
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("raised", "kind"), [(ValueError("a defect"), Internal), (Aborted("STALE", "too old"), Aborted)]
)
async def test_a_stream_whose_requests_cannot_be_read_ends_at_once_and_frees_what_it_held(
    raised: Exception, kind: type[Exception]
) -> None:
    def decode(request: str, opens: object) -> Any:
        raise raised

    engine, state = IdleEngine(), WorkerState()
    state.set_ready(Worker(engine, WorkerInfo("i", "target", None, "", 16, 8, 100)))
    stream = ItemStream[str, str, Any](state, decode, lambda results, load: "response")
    async with asyncio.timeout(1):
        with pytest.raises(kind):
            async for _ in stream.serve(requests()):
                pass
    assert engine.num_closed == 1


class Kept(list[Any]):
    """A list that can be referred to weakly."""


class TalkativeEngine(IdleEngine):
    """Answers when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = asyncio.Event()

    def connect(self, deliver: Callable[[list[Any]], None]) -> TalkativeEngine:
        self.deliver = deliver
        return self

    def close(self) -> None:
        self.closed.set()


async def test_a_coordinator_that_reads_nothing_loses_its_sequences_and_what_waits_for_it() -> None:
    engine, state = TalkativeEngine(), WorkerState()
    state.set_ready(Worker(engine, WorkerInfo("i", "target", None, "", 16, 8, 100)))
    stream = ItemStream[str, int, Any](state, lambda request, opens: ([], []), lambda results, load: len(results))
    unread = Kept([Tokens(Identity("s", 1, 1, 0, 0), (0,), 0, 0, False)] * (MAX_UNREAD_RESULTS + 1))
    is_kept, first = weakref.ref(unread), unread[:1]
    async with asyncio.timeout(5), contextlib.aclosing(stream.serve(requests())) as responses:
        asyncio.get_running_loop().call_soon(lambda: engine.deliver(first))
        assert await anext(responses) == 1  # and no further one is asked for
        engine.deliver(unread)
        del unread
        await engine.closed.wait()
        await asyncio.sleep(0)
        assert is_kept() is None
        with pytest.raises(ResourceExhausted):
            await anext(responses)


class BusyEngine(IdleEngine):
    """Answers all at once, before it is asked."""

    def __init__(self, num_results: int) -> None:
        super().__init__()
        self._num_results = num_results

    def connect(self, deliver: Callable[[list[Any]], None]) -> BusyEngine:
        deliver([Tokens(Identity("s", 1, 1, 0, i), (i,), 0, 0, False) for i in range(self._num_results)])
        return self


@pytest.mark.parametrize("num_results", [0, 1, MAX_ITEMS_A_MESSAGE, 3 * MAX_ITEMS_A_MESSAGE + 1])
async def test_what_has_gathered_goes_out_in_order_in_messages_of_bounded_size(num_results: int) -> None:
    state = WorkerState()
    state.set_ready(Worker(BusyEngine(num_results), WorkerInfo("i", "target", None, "", 16, 8, 100)))

    async def asked() -> AsyncIterator[str]:
        return
        yield

    def encode(results: list[Any], load: WorkerLoad) -> list[Any]:
        return results

    stream = ItemStream[str, list[Any], Any](state, lambda request, opens: ([], []), encode)
    messages = [message async for message in stream.serve(asked())]
    assert [result.token_ids[0] for message in messages for result in message] == [*range(num_results)]
    assert all(len(message) <= MAX_ITEMS_A_MESSAGE for message in messages)
    assert len(messages) == max(1, -(-num_results // MAX_ITEMS_A_MESSAGE))  # an empty one brings the load
