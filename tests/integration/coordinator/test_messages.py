"""Items and results of many sessions travel together: counted on the streams, not timed."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from services.coordinator import server
from services.coordinator.worker_link import Codec
from tests.integration.coordinator.conftest import DRAFT, TARGET, StartCluster

NUM_TOKENS = 32


@dataclass(slots=True)
class Traffic:
    """What went over the streams in one direction."""

    num_messages: int = 0
    num_items: int = 0

    def add(self, items: Sequence[Any]) -> None:
        self.num_messages += 1
        self.num_items += len(items)

    @property
    def items_per_message(self) -> float:
        return self.num_items / self.num_messages


def counted(codec: Codec[Any, Any], sent: Traffic, received: Traffic) -> Codec[Any, Any]:
    def encode(items: Sequence[Any]) -> Any:
        sent.add(items)
        return codec.encode(items)

    def decode(message: Any) -> Sequence[Any]:
        results = codec.decode(message)
        if results:  # a message may tell of the load alone
            received.add(results)
        return results

    return dataclasses.replace(codec, encode=encode, decode=decode)


async def traffic_of(
    num_sessions: int, start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Traffic]:
    """Of both roles and directions while so many sessions generate at once, to their ends."""
    traffic = {name: Traffic() for name in ("to target", "from target", "to draft", "from draft")}
    with monkeypatch.context() as patched:
        for name in ("TARGET_CODEC", "DRAFT_CODEC"):
            codec = getattr(server, name)
            both = traffic[f"to {codec.role}"], traffic[f"from {codec.role}"]
            patched.setattr(server, name, counted(codec, *both))
        target, draft = (
            dataclasses.replace(TARGET, simulated_step_ms=20.0),
            dataclasses.replace(DRAFT, simulated_token_ms=1.0),
        )
        async with start_cluster(target=target, draft=draft) as cluster:
            fields = {"max_tokens": NUM_TOKENS, "num_draft_tokens": 4, "ignore_eos": True}
            running = [cluster.generate(prompt=f"prompt {n}", **fields) for n in range(num_sessions)]
            results = await asyncio.gather(*running)
    assert [len(result.tokens) for result in results] == [NUM_TOKENS] * num_sessions
    return traffic


async def test_messages_of_many_sessions_travel_together(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = await traffic_of(1, start_cluster, monkeypatch)
    together = await traffic_of(64, start_cluster, monkeypatch)
    for direction, traffic in together.items():
        assert alone[direction].items_per_message <= 3, direction
        assert traffic.items_per_message >= 2 * alone[direction].items_per_message, (direction, traffic)
        assert traffic.num_messages <= traffic.num_items / 4, (direction, traffic)
