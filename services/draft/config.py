"""The draft worker's settings.

Owns: their names and defaults. Must not know: what the worker does with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.common.config import setting
from services.common.errors import ConfigError
from services.common.worker_config import DTYPES, WorkerConfig


@dataclass(frozen=True, slots=True)
class DraftConfig(WorkerConfig):
    """Settings of `outrider serve draft`."""

    port: int = setting(50052, "Port to listen on; 0 takes a free one.")
    dtype: str = setting("float32", "Floating point type, or int8 for rounded weights.", choices=(*DTYPES, "int8"))
    drafter: str = setting("ngram", "How tokens are proposed.", choices=("model", "ngram", "simulated"))
    draft_target: str = setting("", "Target that a trained draft was trained for; empty: as the draft names it.")
    ngram_max: int = setting(4, "Longest n-gram that the prompt lookup matches.")
    ngram_min: int = setting(1, "Shortest n-gram that the prompt lookup matches.")
    simulated_token_ms: float = setting(2.0, "Simulated drafter: milliseconds for each token.")
    simulated_acceptance: float = setting(0.7, "Simulated drafter: probability that a token is the target's.")
    simulated_seed: int = setting(0, "Simulated drafter: key of its noise.")

    def __post_init__(self) -> None:
        WorkerConfig.__post_init__(self)  # a slotted dataclass has no super() without arguments
        if self.tensor_parallel_size > 1 and self.drafter != "model":
            raise ConfigError(f"tensor_parallel_size: the drafter {self.drafter} has no model to cut into shards")
