"""A target without weights: a deterministic function of the whole prefix, with the latencies of a device.

Owns: the function, the simulated KV cache and the pace. Must not know: torch, items, the scheduler.

The vocabulary is that of services.common.vocab.simulated_vocab: byte b is token b, and <eos> is 256. The state behind
token i is a hash of tokens [0, i]; it is what the cache holds for the token, in the blocks of the sequence's own table.
The next token is a hash of the last state, restricted to printable ASCII. A token lost or doubled, a block mixed up or
a stale length changes everything that follows.

    state[i] = mix(state[i - 1] xor f(token[i]))        next token = 32 + mix(state xor key) mod 95
    key = 0 at temperature 0, else a hash of seed and fork

Every next token is a point mass, so all verification methods accept exactly the equal tokens; penalties, bias and the
other processing change nothing. Log-probabilities are 0.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable

from services.common.errors import OutriderError
from services.common.values import ModelInfo, TopLogProbs, VerificationMethod, derive_draft_seed
from services.common.vocab import SIMULATED_EOS, simulated_vocab, vocab_digest
from services.engine.block_manager import BlockManager
from services.engine.sequence import Sequence
from services.engine.step import Verdict, Work

SIMULATED = "simulated"
SIMULATED_MAX_SEQUENCE_LEN = 32_768
SIMULATED_NUM_BLOCKS = 65_536

FIRST_PRINTABLE = 32
NUM_PRINTABLE = 95
INITIAL_STATE = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def extend_state(state: int, token_id: int) -> int:
    """The state behind a token that follows `state`."""
    return mix(state ^ ((token_id + 1) * INITIAL_STATE & _MASK))


def sampling_key(sequence: Sequence, *, draft: bool) -> int:
    """What temperature > 0 adds to the hash. For rejection the draft has been given the derived seed already."""
    if sequence.sampling.greedy:
        return 0
    seed = sequence.sampling.seed
    if sequence.verification is VerificationMethod.REJECTION and not draft:
        seed = derive_draft_seed(seed)
    return mix(mix(seed + 1 & _MASK) ^ sequence.fork)


def choose(state: int, key: int, eos_probability: float = 0.0) -> int:
    """The token that follows `state`."""
    word = mix(state ^ key)
    if (word >> 32) < eos_probability * 2**32:
        return SIMULATED_EOS
    return FIRST_PRINTABLE + (word & 0xFFFFFFFF) % NUM_PRINTABLE


class SimulatedCache:
    """The states of all cached tokens, in the blocks of the pool."""

    def __init__(self, blocks: BlockManager) -> None:
        self._block_size = blocks.block_size
        self._states = array("Q", bytes(8 * blocks.num_blocks * blocks.block_size))

    def compute(self, work: Work) -> list[int]:
        """Writes the states of the tokens that a work computes, and returns those of its rows."""
        sequence, first = work.sequence, work.sequence.num_cached
        state = self._states[self._slot(sequence, first - 1)] if first else INITIAL_STATE
        states: list[int] = []
        tokens = sequence.tokens[first : first + work.num_new_tokens]
        for index, token_id in enumerate([*tokens, *work.drafted], start=first):
            state = extend_state(state, token_id)
            self._states[self._slot(sequence, index)] = state
            states.append(state)
        return states[len(states) - work.num_rows :]

    def _slot(self, sequence: Sequence, index: int) -> int:
        block, offset = divmod(index, self._block_size)
        return sequence.block_table[block] * self._block_size + offset


class Pace:
    """Makes steps last as long as the device would. What one overran by the sleep's error, the next makes up for."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._overrun_s = 0.0

    @property
    def now_s(self) -> float:
        return self._clock()

    def wait(self, started_s: float, duration_s: float) -> None:
        """Returns `duration_s` after `started_s`, less the last overrun."""
        deadline_s = started_s + duration_s - self._overrun_s
        while (left_s := deadline_s - self._clock()) > 0:
            self._sleep(left_s)
        self._overrun_s = min(self._clock() - deadline_s, duration_s)


class SimulatedTarget:
    """A TargetModel without weights (services.engine.step.TargetModel) over the states of `blocks`.

    A step lasts step_ms + row_ms * rows + prefill_token_ms * tokens computed without a row. <eos> comes with
    `eos_probability` at each position, but not before the sequence's min_tokens.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        step_ms: float = 0.0,
        row_ms: float = 0.0,
        prefill_token_ms: float = 0.0,
        eos_probability: float = 0.0,
        pace: Pace | None = None,
    ) -> None:
        self._cache = SimulatedCache(blocks)
        self._step_ms = step_ms
        self._row_ms = row_ms
        self._prefill_token_ms = prefill_token_ms
        self._eos_probability = eos_probability
        self._pace = pace or Pace()
        self._info = simulated_info()

    @property
    def info(self) -> ModelInfo:
        return self._info

    def step(self, works: list[Work]) -> list[Verdict | OutriderError | None]:
        """Computes the works and waits until the device would have done so."""
        started_s = self._pace.now_s
        verdicts: list[Verdict | OutriderError | None] = [self._compute(work) for work in works]
        num_rows = sum(work.num_rows for work in works)
        num_prefilled = sum(work.num_computed_tokens for work in works) - num_rows
        duration_ms = self._step_ms + self._row_ms * num_rows + self._prefill_token_ms * num_prefilled
        self._pace.wait(started_s, duration_ms / 1e3)
        return verdicts

    def _compute(self, work: Work) -> Verdict | None:
        states = self._cache.compute(work)
        if not work.num_rows:
            return None
        sequence, key = work.sequence, sampling_key(work.sequence, draft=False)
        token_ids: list[int] = []
        num_accepted = 0
        for row, state in enumerate(states[: sequence.num_remaining_tokens]):
            is_masked = len(sequence) + row - sequence.prompt_len < sequence.sampling.min_tokens
            token_ids.append(choose(state, key, 0.0 if is_masked else self._eos_probability))
            if row == len(work.drafted) or work.drafted[row] != token_ids[-1]:
                break
            num_accepted += 1
            if token_ids[-1] in sequence.eos_token_ids:
                break
        return _verdict(sequence, token_ids, num_accepted)


def _verdict(sequence: Sequence, token_ids: list[int], num_accepted: int) -> Verdict:
    if not sequence.log_probs:
        return Verdict(tuple(token_ids), num_accepted)
    top = [TopLogProbs((token_id,), (0.0,)) for token_id in token_ids] if sequence.num_top_log_probs else []
    return Verdict(tuple(token_ids), num_accepted, (0.0,) * len(token_ids), tuple(top))


def simulated_info() -> ModelInfo:
    """Identity of the simulated model, target and draft alike."""
    vocab = simulated_vocab()
    digest = vocab_digest(vocab)
    return ModelInfo(SIMULATED, f"{SIMULATED}-1", digest, len(vocab), "float32", SIMULATED)
