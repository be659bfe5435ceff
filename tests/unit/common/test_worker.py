"""How one stream of items ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from services.common.errors import Aborted, Internal
from services.common.values import WorkerInfo, WorkerLoad
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
