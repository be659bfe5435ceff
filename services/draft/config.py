"""The draft worker's settings.

Owns: their names and defaults. Must not know: what the worker does with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.common.config import setting
from services.common.drafters import DRAFTER_HELP, parse_chain
from services.common.errors import ConfigError
from services.common.values import MAX_DRAFT_TOKENS
from services.common.worker_config import DTYPES, WorkerConfig


@dataclass(frozen=True, slots=True)
class DraftConfig(WorkerConfig):
    """Settings of `outrider serve draft`."""

    port: int = setting(50052, "Port to listen on; 0 takes a free one.")
    dtype: str = setting("float32", "Floating point type, or int8 for rounded weights.", choices=(*DTYPES, "int8"))
    drafter: str = setting("ngram", f"How tokens are proposed: {DRAFTER_HELP}.")
    draft_target: str = setting("", "Target that a trained draft was trained for; empty: as the draft names it.")
    min_draft_prob: float = setting(
        0.0, "Drafters model and features: end a proposal before a token whose best candidate is less likely; 0: never."
    )
    chain_min_match: int = setting(3, "In a chain, a lookup's match of fewer tokens is left to the next drafter.")
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
    suffix_min_match: int = setting(1, "Suffix drafter: shortest match that yields a proposal.")
    suffix_max_len_factor: float = setting(2.0, "Suffix drafter: most tokens proposed for each token of the match.")
    suffix_min_prob: float = setting(0.1, "Suffix drafter: least estimated probability of a whole proposal.")
    suffix_shared: bool = setting(
        False, "Suffix drafter: match what other sessions were answered, too. It can tell what they were answered."
    )
    suffix_memory_mb: int = setting(64, "Suffix drafter: memory for earlier answers, in MiB; the oldest are forgotten.")
    staged_drafter: str = setting(
        "suffix", "Staged drafter: what drafts for the model.", choices=("suffix", "ngram", "model", "simulated")
    )
    staged_model: str = setting("", "Staged drafter: the model that drafts for the model, with staged_drafter model.")
    staged_draft_tokens: int = setting(4, "Staged drafter: most tokens that the model verifies at once.")
    simulated_token_ms: float = setting(2.0, "Simulated drafter: milliseconds for each token.")
    simulated_acceptance: float = setting(0.7, "Simulated drafter: probability that a token is the target's.")
    simulated_seed: int = setting(0, "Simulated drafter: key of its noise.")

    @property
    def chain(self) -> tuple[str, ...]:
        """The drafters in the order they are asked."""
        return parse_chain(self.drafter)

    def __post_init__(self) -> None:
        WorkerConfig.__post_init__(self)  # a slotted dataclass has no super() without arguments
        chain = self.chain
        if not 0 <= self.min_vocab_overlap <= 1:
            raise ConfigError(f"min_vocab_overlap: {self.min_vocab_overlap} is not between 0 and 1")
        if self.target_tokenizer and chain[-1] != "model":
            raise ConfigError(f"target_tokenizer: only the drafter model can translate, not {self.drafter}")
        if self.tensor_parallel_size > 1 and chain[-1] != "model":
            raise ConfigError(f"tensor_parallel_size: the drafter {self.drafter} has no model to cut into shards")
        if self.min_draft_prob and (chain[-1] not in ("model", "features", "mtp") or self.target_tokenizer):
            raise ConfigError("min_draft_prob: only for model, features and mtp, in the target's own ids")
        limits = {
            "min_draft_prob": (0, 1),
            "chain_min_match": (1, 15),
            "suffix_min_match": (1, 15),
            "suffix_max_len_factor": (0.1, 1000),
            "suffix_min_prob": (0, 1),
            "suffix_memory_mb": (1, 1 << 20),
            "staged_draft_tokens": (1, MAX_DRAFT_TOKENS),
        }
        for name, (low, high) in limits.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name}: {value} is not between {low} and {high}")
        if "ngram" in (*chain, self.staged_drafter) and not 1 <= self.ngram_min <= self.ngram_max:
            raise ConfigError(f"ngram_min: {self.ngram_min} is not between 1 and ngram_max, {self.ngram_max}")
        if "ngram" in chain[:-1] and self.chain_min_match > self.ngram_max:
            raise ConfigError(f"chain_min_match: {self.chain_min_match} is above ngram_max, {self.ngram_max}")
        if "staged" in chain and (self.staged_drafter == "model") != bool(self.staged_model):
            raise ConfigError("staged_model: it goes with staged_drafter model, and must be given there")
