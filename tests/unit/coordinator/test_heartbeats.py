"""Signs of life to clients: a quiet stream is not silent for longer than the heartbeat's interval and a tick."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from services.common.values import TokenOrigin
from services.coordinator.config import CoordinatorConfig
from services.coordinator.coordinator import Coordinator
from services.coordinator.output import Output
from services.coordinator.trim import Trimmed
from tests.fakes.virtual_time import VirtualTimeLoop, run

TOKEN = Trimmed(0, (1,), (TokenOrigin.TARGET,), ("a",), "", (), (), None)


def new_coordinator(heartbeat_ms: int) -> Any:
    """One that does nothing but beat."""
    parts: dict[str, Any] = dict.fromkeys(
        ("tokenizers", "placement", "store", "committer", "usage", "tally"), Mock(name="unused")
    )
    return Coordinator(CoordinatorConfig(tokenizer="simulated", heartbeat_ms=heartbeat_ms), **parts)


@pytest.mark.parametrize("first_s", [0.0, 0.1, 0.2, 0.3, 0.45])
def test_between_two_messages_of_a_quiet_stream_lies_hardly_more_than_the_interval(first_s: float) -> None:
    async def main() -> list[float]:
        coordinator, output = new_coordinator(heartbeat_ms=500), Output(max_unread_tokens=4, slow_client_s=5.0)
        coordinator._running["s"] = SimpleNamespace(output=output)
        beating, reader = asyncio.create_task(coordinator._beat_streams()), aiter(output)
        await asyncio.sleep(first_s)
        output.put(TOKEN, 1)
        sent_s = []
        while len(sent_s) < 12:
            await anext(reader)
            sent_s.append(asyncio.get_running_loop().time())
        beating.cancel()
        return sent_s

    sent_s = run(main(), VirtualTimeLoop())
    gaps_s = [later - earlier for earlier, later in pairwise(sent_s)]
    assert max(gaps_s) <= 0.6 + 1e-6
    assert min(gaps_s) >= 0.5 - 1e-6
