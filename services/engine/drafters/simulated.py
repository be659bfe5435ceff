"""A draft model without weights that agrees with the simulated target as often as it is told to.

Owns: when it errs, and its latency. Must not know: torch, the target worker; it computes the target's function itself.
"""

from __future__ import annotations

from services.common.values import ModelInfo
from services.engine.block_manager import BlockManager
from services.engine.drafters.model import ModelDrafter
from services.engine.noise import NoiseKeys, Purpose, uniform, words
from services.engine.simulated import (
    FIRST_PRINTABLE,
    NUM_PRINTABLE,
    SIMULATED,
    Pace,
    SimulatedCache,
    choose,
    sampling_key,
    simulated_info,
)
from services.engine.step import Sampled, Work


class SimulatedDraft:
    """A DraftModel (services.engine.step.DraftModel), to be driven by ModelDrafter over the same `blocks`.

    With probability `acceptance` a token is the target's, else another printable one. The choice is noise of `seed`,
    the token's index and the whole prefix, so it repeats where the prefix does. A step lasts token_ms, however many
    sequences take part. Knows nothing of a target's <eos>: where one would come, it errs.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        token_ms: float = 0.0,
        acceptance: float = 0.7,
        seed: int = 0,
        pace: Pace | None = None,
    ) -> None:
        if not 0.0 <= acceptance <= 1.0:
            raise ValueError(f"acceptance is a probability, not {acceptance}")
        self._cache = SimulatedCache(blocks)
        self._token_ms = token_ms
        self._acceptance = acceptance
        self._seed = seed
        self._pace = pace or Pace()
        self._info = simulated_info()

    @property
    def info(self) -> ModelInfo:
        return self._info

    def step(self, works: list[Work]) -> list[Sampled | None]:
        """Computes the works and waits until the device would have done so."""
        started_s = self._pace.now_s
        states = [self._cache.compute(work) for work in works]
        rows = [(work, state[-1]) for work, state in zip(works, states, strict=True) if work.num_rows]
        drawn = iter(self._draw(rows) if rows else [])
        sampled = [next(drawn) if work.num_rows else None for work in works]
        self._pace.wait(started_s, self._token_ms / 1e3)
        return sampled

    def _draw(self, rows: list[tuple[Work, int]]) -> list[Sampled]:
        """One token for each work and its last state."""
        seeds = [self._seed ^ state for _, state in rows]
        indices = [len(work.sequence) for work, _ in rows]
        variates = uniform(words(NoiseKeys(seeds, indices, Purpose.DRAFT), 0)).tolist()
        return [self._sample(work, state, u) for (work, state), u in zip(rows, variates, strict=True)]

    def _sample(self, work: Work, state: int, u: float) -> Sampled:
        token_id = choose(state, sampling_key(work.sequence, draft=True))
        if u >= self._acceptance:
            distance = 1 + int((u - self._acceptance) / (1.0 - self._acceptance) * (NUM_PRINTABLE - 1))
            token_id = FIRST_PRINTABLE + (token_id - FIRST_PRINTABLE + distance) % NUM_PRINTABLE
        return Sampled(token_id, None)


def simulated_drafter(
    blocks: BlockManager, *, token_ms: float = 0.0, acceptance: float = 0.7, seed: int = 0, pace: Pace | None = None
) -> ModelDrafter:
    """The drafter `simulated`: a SimulatedDraft, stepped and batched as a real model is."""
    pace = pace or Pace()
    draft = SimulatedDraft(blocks, token_ms=token_ms, acceptance=acceptance, seed=seed, pace=pace)
    return ModelDrafter(draft, blocks, kind=SIMULATED, clock=lambda: round(pace.now_s * 1e9))
