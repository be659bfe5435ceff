"""The settings of `outrider train-draft`.

Owns: their names, defaults and limits. Must not know: what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.common.config import setting
from services.common.errors import ConfigError
from services.common.worker_config import DTYPES

STAGES = ("all", "self-play", "train", "evaluate")
KINDS = ("model", "early_exit", "features", "mtp")
LOSSES = ("kl", "tv")
DEFAULT_HEAD_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Settings of `outrider train-draft`."""

    target: str = setting("sample", "Model to distil: `sample`, a Hugging Face id, a directory or a GGUF file.")
    out: str = setting("", "Directory of the draft; self-play and checkpoints lie below it. Run again, it goes on.")
    self_play: str = setting("", "Directory of the self-play instead of OUT/self-play; several runs may share one.")
    stage: str = setting("all", "What to do of it.", choices=STAGES)
    kind: str = setting(
        "model",
        "model: layers of its own. early_exit: the target's, with a norm and projection trained. features: layers of "
        "its own, fed with the target's final hidden states (drafter features). mtp: heads on these, a token each, "
        "without layers (drafter mtp).",
        choices=KINDS,
    )
    device: str = setting("cpu", "`cpu` or `cuda`.")
    dtype: str = setting(
        "auto",
        "Floating point type of self-play and of the products in training; auto: bfloat16 where the device computes "
        "in it, else float32.",
        choices=("auto", *DTYPES),
    )
    threads: int = setting(0, "Threads on CPU; 0 takes one a core.")
    seed: int = setting(0, "Of everything that is drawn.")
    max_minutes: float = setting(0.0, "Stop, resumably, after so many minutes; 0: when all is done.")
    self_play_tokens: int = setting(10_000_000, "Tokens of self-play to write in all.")
    num_sequences: int = setting(0, "Conversations written at once; 0: 96 on CPU, 512 on CUDA.")
    max_conversation_len: int = setting(1024, "Most tokens of a conversation.")
    shard_tokens: int = setting(16_384, "Tokens of a file of self-play.")
    keep_features: bool = setting(
        True,
        "Kinds features and mtp: keep the target's hidden states with the self-play, 2 bytes times its width a token; "
        "else training computes them anew in every step.",
    )
    start: str = setting(
        "",
        "Trained draft of the same layers, `sample-draft` or `sample-head` to start from in place of the target's.",
    )
    layers: str = setting("0", "Layers of the target that the draft starts from, say 0,29.")
    width: int = setting(0, "Hidden size of the draft; 0: the target's. Another starts from random layers.")
    head_tokens: int = setting(
        0,
        f"Output vocabulary: so many of the self-play's most frequent tokens; 0: {DEFAULT_HEAD_TOKENS}, or those of "
        "the draft to start from.",
    )
    loss: str = setting(
        "kl", "kl: forward KL on the target's top 64 and the rest; tv: total variation.", choices=LOSSES
    )
    unroll: int = setting(
        3, "Kind features: passes of a training step, each on the features of the one before, as in a proposal."
    )
    heads: int = setting(4, "Kind mtp: heads, and so the most tokens of a draft.")
    train_tokens: int = setting(40_000_000, "Tokens to train on in all; those of the self-play are used repeatedly.")
    batch_tokens: int = setting(0, "Tokens of a training step; 0: 512 on CPU, 2048 on CUDA.")
    learning_rate: float = setting(1e-3, "Highest learning rate of AdamW.")
    checkpoint_minutes: float = setting(2.0, "Time between checkpoints.")
    num_draft_tokens: int = setting(5, "Draft length that the evaluation reports.")

    def __post_init__(self) -> None:
        if not self.out:
            raise ConfigError("out: name the directory of the draft")
        limits = {
            "threads": (0, 1024),
            "max_minutes": (0, 1e6),
            "self_play_tokens": (1, 1 << 40),
            "num_sequences": (0, 4096),
            "max_conversation_len": (64, 1 << 20),
            "shard_tokens": (1, 1 << 24),
            "width": (0, 1 << 16),
            "head_tokens": (0, 1 << 20),
            "unroll": (1, 16),
            "heads": (1, 16),
            "train_tokens": (1, 1 << 40),
            "batch_tokens": (0, 1 << 20),
            "learning_rate": (1e-7, 1.0),
            "checkpoint_minutes": (0, 1e6),
            "num_draft_tokens": (1, 16),
        }
        for name, (low, high) in limits.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name}: {value} is not between {low} and {high}")
        if 0 < self.head_tokens < 16:
            raise ConfigError(f"head_tokens: {self.head_tokens} is not between 16 and {1 << 20}, nor 0")
        if self.kind == "early_exit" and self.width:
            raise ConfigError("width: an early exit is as wide as its target; leave it out")
        if self.kind == "features" and self.width:
            raise ConfigError("width: a head on features is as wide as its target; leave it out")
        if self.kind == "mtp" and (self.width or self.start or self.layers != "0"):
            raise ConfigError("kind: heads have no layers; leave out layers, width and start")
        if self.start and self.kind == "early_exit":
            raise ConfigError("start: an early exit starts from its target; leave it out")
        self.layer_indices  # noqa: B018 - raises where they are malformed

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Raises ConfigError for anything but distinct rising numbers."""
        try:
            indices = tuple(int(part) for part in self.layers.split(","))
        except ValueError:
            raise ConfigError(f"layers: {self.layers!r} is no list of layers such as 0,29") from None
        if list(indices) != sorted(set(indices)) or indices[0] < 0:
            raise ConfigError(f"layers: {self.layers!r} are not distinct and rising")
        return indices
