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
    target_tokenizer: str = setting(
        "", "The target's tokenizer, where its vocabulary is another: a directory, a Hugging Face id or `sample`."
    )
    min_vocab_overlap: float = setting(
        0.1, "With target_tokenizer: least share of shared tokens in either vocabulary to start with."
    )
    greedy_matching: str = setting(
        "text", "With target_tokenizer: what greedy requests are drafted by.", choices=("text", "tokens")
    )
    ngram_max: int = setting(4, "Longest n-gram that the prompt lookup matches.")
    ngram_min: int = setting(1, "Shortest n-gram that the prompt lookup matches.")
    simulated_token_ms: float = setting(2.0, "Simulated drafter: milliseconds for each token.")
    simulated_acceptance: float = setting(0.7, "Simulated drafter: probability that a token is the target's.")
    simulated_seed: int = setting(0, "Simulated drafter: key of its noise.")

    def __post_init__(self) -> None:
        WorkerConfig.__post_init__(self)  # a slotted dataclass has no super() without arguments
        if not 0 <= self.min_vocab_overlap <= 1:
            raise ConfigError(f"min_vocab_overlap: {self.min_vocab_overlap} is not between 0 and 1")
        if self.target_tokenizer and self.drafter != "model":
            raise ConfigError(f"target_tokenizer: the drafter {self.drafter} has no vocabulary of its own")
        if self.tensor_parallel_size > 1 and self.drafter != "model":
            raise ConfigError(f"tensor_parallel_size: the drafter {self.drafter} has no model to cut into shards")
