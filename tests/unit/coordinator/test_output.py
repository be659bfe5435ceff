from __future__ import annotations

import asyncio

import pytest

from services.common.errors import Aborted, Unavailable
from services.common.values import FinishReason, TokenOrigin
from services.coordinator.output import TICKS_A_HEARTBEAT, Chunk, Output
from services.coordinator.statistics import GenerationStatistics
from services.coordinator.trim import Trimmed


def kept(offset: int, num: int, finish: FinishReason | None = None) -> Trimmed:
    return Trimmed(offset, (1,) * num, (TokenOrigin.TARGET,) * num, ("a",) * num, "", (), (), finish)


def an_output(max_unread_tokens: int = 4, slow_client_s: float = 5.0) -> Output:
    return Output(max_unread_tokens=max_unread_tokens, slow_client_s=slow_client_s)


async def test_what_waits_unread_goes_out_together() -> None:
    output = an_output()
    output.put(kept(0, 1), 1)
    output.put(kept(1, 2), 3)
    chunk = await anext(aiter(output))
    assert ([len(k.token_ids) for k in chunk.kept], chunk.durable_len) == ([1, 2], 3)


async def test_the_last_tokens_and_the_finish_are_one_chunk() -> None:
    output, statistics = an_output(), GenerationStatistics()
    output.put(kept(0, 1), 1)
    output.put(kept(1, 1, FinishReason.EOS), 2)
    reader = aiter(output)
    assert (await anext(reader)).finish is None
    output.end(FinishReason.EOS, statistics)
    chunk = await anext(reader)
    assert (len(chunk.kept), chunk.finish, chunk.statistics) == (1, FinishReason.EOS, statistics)
    with pytest.raises(StopAsyncIteration):
        await anext(reader)


async def test_an_error_comes_after_what_was_put() -> None:
    output = an_output()
    output.put(kept(0, 1), 1)
    output.fail(Unavailable("NO_TARGET", "gone"))
    output.fail(Aborted("STALE", "later"))
    reader = aiter(output)
    assert (await anext(reader)).kept
    with pytest.raises(Unavailable):
        await anext(reader)


async def test_a_writer_waits_while_the_output_is_full() -> None:
    output = an_output(max_unread_tokens=2)
    output.put(kept(0, 2), 2)
    writer = asyncio.create_task(output.writable())
    await asyncio.sleep(0)
    assert not writer.done()
    await anext(aiter(output))
    await writer
    assert not output.full


async def test_a_reader_that_does_not_read_is_too_slow() -> None:
    output = an_output(max_unread_tokens=1, slow_client_s=0.01)
    output.put(kept(0, 1), 1)
    with pytest.raises(Aborted) as caught:
        await output.writable()
    assert caught.value.reason == "SLOW_CLIENT"


async def test_only_a_quiet_stream_gets_a_heartbeat() -> None:
    output = an_output()
    reader = aiter(output)
    output.put(kept(0, 1), 1)
    await anext(reader)
    beat = asyncio.ensure_future(anext(reader))
    for _ in range(TICKS_A_HEARTBEAT):
        output.tick()
        await asyncio.sleep(0)
        assert not beat.done()
    output.tick()
    assert await beat == Chunk((), 1)
