"""Values that every part speaks of: sampling parameters, proposals, results of a step, identity of work.

Owns: their meaning, units and limits. Must not know: the wire, Redis, torch. Everything here is immutable.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

PROTOCOL_VERSION = 1
NOISE_VERSION = 1

DEFAULT_NUM_DRAFT_TOKENS = 4
"""Where a fixed number is needed and none is given."""
MAX_DRAFT_TOKENS = 16
MAX_TOP_LOG_PROBS = 20
MAX_LOGIT_BIAS = 300
MAX_FEATURE_ROWS = MAX_DRAFT_TOKENS + 1
"""Most tokens that one message tells a draft features of: what a verdict can have."""
MAX_DRAFT_ROW_LEN = 64
"""Entries of the sparse row that a drafted token may be drawn from (the draft's own top-k)."""


class Range(NamedTuple):
    """Numbers that are allowed; NaN is in none."""

    low: float
    high: float
    low_open: bool = False

    def holds(self, number: float) -> bool:
        return self.low <= number <= self.high and not (self.low_open and number == self.low)

    def __str__(self) -> str:
        return f"{'(' if self.low_open else '['}{self.low}, {self.high}]"


SAMPLING_RANGES = {
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, low_open=True),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 10, low_open=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
}
"""Of the fields of SamplingParams. Outside of them a row of logits may have no distribution."""
LOGIT_BIAS_RANGE = Range(-100, 100)

THRESHOLD = 0.1
"""The lossy verification method accepts a token while the target gives it more than this."""


class VerificationMethod(enum.Enum):
    """How the target checks a proposal; greedy (temperature 0) is the same function for all three."""

    COUPLED = "coupled"
    REJECTION = "rejection"
    THRESHOLD = "threshold"

    @property
    def lossy(self) -> bool:
        return self is VerificationMethod.THRESHOLD


class TokenOrigin(enum.IntEnum):
    """Who chose a token. The value is the byte that the session's record holds."""

    DRAFT = 1
    TARGET = 2


class FinishReason(enum.Enum):
    """Why a generation ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Processing of the logits and the key of the noise. Validated where a request comes in."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def derive_draft_seed(seed: int) -> int:
    """One-way function of a request's seed: what a draft that verifies by rejection gets instead of it.

    A draft that knew the request's seed could choose tokens by the target's accept and residual noise.
    """
    digest = hashlib.sha256(b"outrider draft seed" + seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little")


class SparseRow(NamedTuple):
    """The distribution that one drafted token was drawn from. Unsorted; ids are of the target's vocabulary."""

    token_ids: tuple[int, ...]
    probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens a draft expects next. `rows` is None where each is a point mass (deterministic choice)."""

    proposal_id: int
    token_ids: tuple[int, ...]
    rows: tuple[SparseRow | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class TopLogProbs:
    """The most likely tokens at one position, most likely first, under the raw logits."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity of a loaded model; the digests are SHA-256 in hexadecimal."""

    name: str
    digest: str
    vocab_digest: str
    vocab_size: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How busy a worker is."""

    num_sequences: int = 0
    num_queued: int = 0
    num_used_blocks: int = 0
    num_blocks: int = 0
    draining: bool = False


class DeviceUsage(NamedTuple):
    """Memory of the device that a worker computes on, whoever uses it; on a CPU what is used is the process's own."""

    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    """0: unknown."""


@dataclass(frozen=True, slots=True)
class WorkerActivity:
    """What a worker has done since its start; who wants a rate compares two of them."""

    num_steps: int = 0
    num_step_sequences: int = 0
    """Sequences of all steps together; likewise rows."""
    num_step_rows: int = 0
    num_prefill_tokens: int = 0
    num_tokens: int = 0
    """Tokens that it answered: drafted by a draft, accepted or its own by a target."""
    busy_ns: int = 0
    """Time in steps."""
    num_answers: int = 0
    queue_ns: int = 0
    """Time that the answered items waited for their first step, together."""
    num_prefix_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    memory_used_bytes: int = 0
    """Of the device; total 0: unknown."""
    memory_total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker tells of itself."""

    instance_id: str
    role: str
    """`draft` or `target`."""
    model: ModelInfo | None
    drafter: str
    max_draft_tokens: int
    max_sequences: int
    max_sequence_len: int
    load: WorkerLoad = field(default_factory=WorkerLoad)
    protocol_version: int = PROTOCOL_VERSION
    noise_version: int = NOISE_VERSION
    startup_ms: float = 0.0
    activity: WorkerActivity = field(default_factory=WorkerActivity)
    wants_features: bool = False
    """Of a draft: whether it can use the target's features."""
