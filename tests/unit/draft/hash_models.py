"""A draft model whose next token is a hash of the whole prefix, as a drafter's model and as a verifying one.

Owns: that the hash is read through the block tables, so that a wrong cache shows in the tokens.
"""

from __future__ import annotations

from services.common.values import ModelInfo
from services.engine.block_manager import BlockManager
from services.engine.simulated import INITIAL_STATE, SimulatedCache, choose, extend_state, simulated_info
from services.engine.step import Sampled, Verdict, Work

DRAFT_KEY = 99
"""Makes the model's function another one than the target's."""


def drafted_continuation(tokens: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    drafted = list(tokens)
    for _ in range(num_tokens):
        state = INITIAL_STATE
        for token_id in drafted:
            state = extend_state(state, token_id)
        drafted.append(choose(state, DRAFT_KEY))
    return tuple(drafted[len(tokens) :])


class HashDraft:
    """The model as a DraftModel. With `errs_every` about every such token is another one."""

    def __init__(self, blocks: BlockManager, errs_every: int = 0) -> None:
        self._cache = SimulatedCache(blocks)
        self._errs_every = errs_every
        self.steps: list[list[tuple[int, int]]] = []

    @property
    def info(self) -> ModelInfo:
        return simulated_info()

    def step(self, works: list[Work]) -> list[Sampled | None]:
        self.steps.append([(work.num_new_tokens, work.num_rows) for work in works])
        states = [self._cache.compute(work) for work in works]
        return [Sampled(self._choose(state[-1]), None) if state else None for state in states]

    def _choose(self, state: int) -> int:
        token_id = choose(state, DRAFT_KEY)
        return token_id if not self._errs_every or state % self._errs_every else token_id ^ 1


class HashVerifier:
    """The model as a TargetModel."""

    def __init__(self, blocks: BlockManager) -> None:
        self._cache = SimulatedCache(blocks)
        self.num_steps = 0

    @property
    def info(self) -> ModelInfo:
        return simulated_info()

    def step(self, works: list[Work]) -> list[Verdict | None]:
        self.num_steps += 1
        return [self._verify(work) for work in works]

    def _verify(self, work: Work) -> Verdict | None:
        states = self._cache.compute(work)
        tokens: list[int] = []
        for row, state in enumerate(states):
            tokens.append(choose(state, DRAFT_KEY))
            if row == len(work.drafted) or work.drafted[row] != tokens[-1] or tokens[-1] in work.sequence.eos_token_ids:
                break
        return Verdict(tuple(tokens), len(tokens) - 1) if tokens else None
