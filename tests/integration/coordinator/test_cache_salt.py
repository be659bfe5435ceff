"""Cached prefixes by the request's salt, and `outrider bench`, which measures with salts of its own."""

from __future__ import annotations

from collections.abc import Sequence

from services.cli.bench.load import Load, LoadPlan
from services.cli.bench.sample import Mode, Sample
from services.cli.prompts import Conversation
from services.client import GenerateOptions, OutriderClient
from tests.integration.coordinator.conftest import Cluster

PROMPT = "A prompt of several blocks that all of them begin with. " * 8
CONVERSATIONS = tuple(Conversation(i, "qa", (f"{PROMPT}{i}", f"And then? {i}")) for i in range(2))
OPTIONS = GenerateOptions(temperature=0.0, max_tokens=40, ignore_eos=True, num_draft_tokens=4)


def num_hit_tokens(cluster: Cluster) -> list[int]:
    """Prompt tokens that target and draft have found in their caches so far."""
    assert cluster.draft is not None
    activities = (cluster.target.worker.activity(), cluster.draft.worker.activity())
    return [activity.num_prefix_hit_tokens for activity in activities]


async def test_only_a_request_of_the_same_salt_finds_the_prefix_on_either_worker(cluster: Cluster) -> None:
    async def new_hits(salt: str) -> list[bool]:
        before = num_hit_tokens(cluster)
        await cluster.generate(prompt=PROMPT, max_tokens=4, num_draft_tokens=4, ignore_eos=True, cache_salt=salt)
        return [after - was >= 400 for was, after in zip(before, num_hit_tokens(cluster), strict=True)]

    salts = ("", "", "a", "a", "b", "")
    assert [await new_hits(salt) for salt in salts] == [[hits] * 2 for hits in (False, True, False, True, False, True)]


async def hits_by_mode(cluster: Cluster, plan: LoadPlan) -> dict[Mode, list[int]]:
    """Prompt tokens that the target found, block by block."""
    found: dict[Mode, list[int]] = {mode: [] for mode in Mode}
    async with OutriderClient(f"127.0.0.1:{cluster.coordinator.port}") as client:
        load = Load(client, plan)
        await load.warm_up(CONVERSATIONS)
        before = num_hit_tokens(cluster)[0]
        async for block in load.run(CONVERSATIONS):
            assert all(isinstance(outcome, Sample) for outcome in block.outcomes)
            after = num_hit_tokens(cluster)[0]
            found[block.mode].append(after - before)
            before = after
    return found


async def test_first_turns_of_a_bench_find_nothing_in_either_mode(cluster: Cluster) -> None:
    found = await hits_by_mode(cluster, LoadPlan(OPTIONS, raw=True))
    assert found == {Mode.PLAIN: [0, 0], Mode.SPECULATIVE: [0, 0]}


async def test_further_turns_of_a_bench_find_their_own_first_in_both_modes(cluster: Cluster) -> None:
    found = await hits_by_mode(cluster, LoadPlan(OPTIONS, raw=True, all_turns=True))
    assert found[Mode.PLAIN] == found[Mode.SPECULATIVE]
    assert min(found[Mode.PLAIN]) >= _num_whole_blocks_tokens(CONVERSATIONS)


def _num_whole_blocks_tokens(conversations: Sequence[Conversation]) -> int:
    """Tokens, which are bytes here, of a first turn and its answer, but for the last block's."""
    return min(len(conversation.turns[0]) for conversation in conversations) + OPTIONS.max_tokens - 16
