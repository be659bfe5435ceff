"""Every part is replaced by one of another version under load, as the chart's controllers do it: nobody notices.

With OUTRIDER_PREDECESSOR, a checkout of an earlier version with its own stubs, also from that one. What was seen goes
into the file OUTRIDER_UPGRADE_RESULTS.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from services.client import GenerateOptions, OutriderClient, Result
from services.common.service import wait_until
from tests.fakes.deployment import COORDINATORS, Deployment, deployed
from tests.fakes.homes import session_at
from tests.fakes.kubernetes_api import KubernetesApi, kubeconfig
from tests.fakes.service_process import PRESENT, Version

NUM_CLIENTS = 4
NUM_LONG = len(COORDINATORS)
"""Clients whose generations are long enough to be under way whatever is replaced: one at each coordinator."""
OPTIONS = GenerateOptions(ignore_eos=True, temperature=1.0, num_draft_tokens=4)
BEFORE = "before"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubernetesApi]:
    with KubernetesApi().serving() as api:
        (tmp_path / "config").write_text(kubeconfig(api.url))
        yield api


def num_tokens(seed: int) -> int:
    return 640 if seed % NUM_CLIENTS < NUM_LONG else 60


@dataclass(frozen=True, slots=True)
class Served:
    """A generation, and what was missing or new when it began and when it had ended."""

    seed: int
    result: Result
    began: str
    ended: str


@dataclass
class Load:
    """Clients that generate without a pause; every result is kept."""

    client: OutriderClient
    served: list[Served] = field(default_factory=list)
    num_received: list[int] = field(default_factory=lambda: [0] * NUM_CLIENTS)
    """Tokens of each client's present generation."""
    state: str = BEFORE
    stopped: bool = False

    async def run(self, seed: int) -> None:
        while not self.stopped:
            began = self.state
            self.served.append(Served(seed, await self.generate(seed), began, self.state))
            seed += NUM_CLIENTS

    async def generate(self, seed: int) -> Result:
        place = seed % NUM_CLIENTS
        self.num_received[place] = 0
        options = replace(OPTIONS, seed=seed, max_tokens=num_tokens(seed))
        generation = self.client.generate(f"Prompt {seed}", options, session_id=session_at(place % NUM_LONG))
        async for chunk in generation:
            self.num_received[place] += len(chunk.tokens)
        return generation.result

    async def long_ones_under_way(self) -> None:
        """Returns when each is far from its end."""
        assert await wait_until(lambda: all(50 < n < 400 for n in self.num_received[:NUM_LONG]), 30, 0.01)

    async def go_on(self, state: str) -> None:
        """In this state of the cluster, until some generations have begun and ended in it, drafted where a draft is."""
        self.state = state
        assert await wait_until(lambda: len(self._within(state)) >= NUM_CLIENTS - NUM_LONG, 30), state
        if state == "without a draft":
            assert not any(map(_drafted, self._within(state)))
        else:
            assert await wait_until(lambda: any(map(_drafted, self._within(state))), 30), state

    def _within(self, state: str) -> list[Result]:
        return [served.result for served in self.served if served.began == served.ended == state]

    async def go_on_without_redis(self, state: str) -> None:
        """Nothing new begins; what runs goes on, for longer than writes wait for Redis."""
        self.state = state
        goals = [n + 100 for n in self.num_received[:NUM_LONG]]
        assert await wait_until(lambda: all(map(int.__ge__, self.num_received, goals)), 30)


def _drafted(result: Result) -> bool:
    return result.statistics.num_accepted_tokens > 0


async def roll(deployment: Deployment, load: Load, role: str) -> None:
    """One change after the other, the load going on in between."""
    await load.long_ones_under_way()
    async for state in deployment.replacing(role):
        if state == "without Redis":
            await load.go_on_without_redis(state)
        else:
            await load.go_on(state)
            await load.long_ones_under_way()


async def roll_together(deployment: Deployment, load: Load, *roles: str) -> None:
    """As `helm upgrade` does: nobody waits for another."""

    async def alone(role: str) -> None:
        async for _ in deployment.replacing(role):
            pass

    await load.long_ones_under_way()
    load.state = "replacing all"
    await asyncio.gather(*map(alone, roles))
    await load.go_on("all replaced")


Order = tuple[tuple[str, ...], ...]
"""Roles one after the other, those in the same tuple together."""
TOGETHER: Order = (("draft", "target", "coordinator"),)
DRAFT_FIRST: Order = (("draft",), ("target",), ("coordinator",))
COORDINATOR_FIRST: Order = tuple(reversed(DRAFT_FIRST))
UPDATES = [
    (Version("predecessor"), PRESENT, TOGETHER),
    (Version("predecessor"), PRESENT, COORDINATOR_FIRST),
    (PRESENT, Version("successor"), DRAFT_FIRST),
]
if "OUTRIDER_PREDECESSOR" in os.environ:
    tree = Path(os.environ["OUTRIDER_PREDECESSOR"])
    checkout = Version((tree / "COMMIT").read_text(), tree)
    UPDATES += [(checkout, PRESENT, DRAFT_FIRST), (checkout, PRESENT, COORDINATOR_FIRST)]


def _case(before: Version, after: Version, order: Order) -> Any:
    """In `make test` all at once alone, which takes half a minute; the others take one."""
    marks, how = ((), "all at once") if order == TOGETHER else (pytest.mark.slow, f"{order[0][0]} first")
    return pytest.param(before, after, (*order, ("redis",)), id=f"{before.name} to {after.name}, {how}", marks=marks)


@pytest.mark.parametrize(("before", "after", "order"), [_case(*update) for update in UPDATES])
async def test_replacing_every_part_under_load_fails_no_request_and_changes_no_token(
    api: KubernetesApi,
    tmp_path: Path,
    before: Version,
    after: Version,
    order: Order,
    request: pytest.FixtureRequest,
) -> None:
    async with deployed(api, tmp_path / "config", tmp_path, before) as deployment:
        deployment.version = after
        async with OutriderClient(*deployment.addresses) as client:
            load = Load(client)
            async with asyncio.TaskGroup() as clients:
                for seed in range(NUM_CLIENTS):
                    clients.create_task(load.run(seed))
                await load.go_on(BEFORE)
                for roles in order:
                    await (roll if len(roles) == 1 else roll_together)(deployment, load, *roles)
                load.stopped = True
            results = [served.result for served in load.served]
            undisturbed = await asyncio.gather(*[load.generate(served.seed) for served in load.served])
            records = await asyncio.gather(*[client.get_session(result.session_id) for result in results])
    assert [result.token_ids for result in results] == [result.token_ids for result in undisturbed]
    assert all(len(served.result.tokens) == num_tokens(served.seed) for served in load.served)
    assert [record.token_ids for record in records] == [(*r.prompt_token_ids, *r.token_ids) for r in results]
    assert any(result.num_resumptions for result in results)
    if file := os.environ.get("OUTRIDER_UPGRADE_RESULTS"):
        record_results(Path(file), request.node.callspec.id, results)


def record_results(path: Path, update: str, results: list[Result]) -> None:
    """Beside what other updates left in the file."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[update] = {
        "generations": len(results),
        "tokens": sum(len(result.tokens) for result in results),
        "resumed_generations": sum(result.num_resumptions > 0 for result in results),
    }
    path.write_text(json.dumps(known, indent=2) + "\n")
