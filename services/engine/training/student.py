"""The model in training: layers taken from the target, between its frozen embedding and part of its frozen head.

Owns: what is trained, how it starts, and the directory it is exported to (services.engine.trained_draft reads it). Must
not know: data, losses, schedules. An early exit's layers stay the target's: only what follows them learns. The two
projections start as the identity and cost nothing later: they are multiplied into embedding and head when the draft is
loaded.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.common.errors import ConfigError, ModelUnsupported
from services.engine.models import load_config
from services.engine.trained_draft import (
    EARLY_EXIT,
    SECTION,
    Ends,
    Manifest,
    embedding_scale,
    read_layers,
    read_manifest,
    skeleton,
)
from services.engine.training.corpus import Batch

PROJECTIONS = ("input_projection", "output_projection")
FEATURE_PROJECTION = "feature_projection"


class Student(torch.nn.Module):
    """Tokens [B, T] to hidden states in the target's space; `logits` turns chosen ones into scores of `head_ids`."""

    embedding: Tensor
    head: Tensor

    def __init__(self, config: Any, ends: Ends, head_ids: Tensor, kind: str = "model", attention: str = "sdpa") -> None:
        """`config`: of the student, see `student_config`. Weights are random until `start_from` or a checkpoint."""
        super().__init__()
        self._kind = kind
        self.config, hidden = config, ends.embedding.shape[1]
        self.causal = skeleton(config, attention)
        self.base = self.causal.base_model
        width = config.get_text_config().hidden_size
        self.register_buffer("embedding", ends.embedding.float() * embedding_scale(self.causal), persistent=False)
        self.register_buffer("head", ends.head[head_ids].float(), persistent=False)
        self.head_ids = head_ids
        self.input_projection = _projection(width, hidden)
        self.output_projection = _projection(hidden, width)
        self.add_inputs()
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained().values():
            parameter.requires_grad_(True)

    def add_inputs(self) -> None:
        """Adds parameters that a kind has for inputs of its own."""

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that learn, by the names they are exported under."""
        if self._kind == EARLY_EXIT:
            around = {name: p for name, p in self.causal_parameters().items() if not _in_layer(name)}
            return around | {"output_projection": self.output_projection}
        return self.causal_parameters() | {name: getattr(self, name) for name in PROJECTIONS}

    def causal_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those of layers and norms, without embedding and head."""
        ends = {
            id(p)
            for m in (self.causal.get_input_embeddings(), self.causal.get_output_embeddings())
            for p in m.parameters()
        }
        return {name: p for name, p in self.causal.named_parameters() if id(p) not in ends}

    def forward(self, tokens: Tensor) -> Tensor:
        """Causal over each line; padding behind a line's end changes nothing before it."""
        inputs = torch.nn.functional.embedding(tokens, self.embedding) @ self.input_projection.T
        hidden: Tensor = self.base(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return hidden

    def passes(self, batch: Batch, num_passes: int, cut: bool = False) -> list[Tensor]:
        """Hidden states [B, T, width] by place in a draft; the last ones count for all places beyond.

        `cut`: keep from some conversations what is not always there in service.
        """
        return [self(batch.tokens)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [P, width] to float32 logits [P, R]."""
        return (hidden @ self.output_projection.T @ self.head.T).float()

    def export(self, directory: Path, manifest: Manifest, dtype: torch.dtype) -> None:
        """Writes what services.engine.trained_draft loads."""
        directory.mkdir(parents=True, exist_ok=True)
        config = copy.deepcopy(self.config)
        setattr(config, SECTION, manifest.section())
        config.dtype = dtype
        config.architectures = [type(self.causal).__name__]
        config.save_pretrained(directory)
        weights = {name: p.detach().to("cpu", dtype).contiguous() for name, p in self.trained().items()}
        weights["head_ids"] = self.head_ids.to("cpu", torch.int32)
        save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _in_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _projection(rows: int, columns: int) -> torch.nn.Parameter:
    if rows == columns:
        return torch.nn.Parameter(torch.eye(rows))
    return torch.nn.Parameter(torch.randn(rows, columns) * max(rows, columns) ** -0.5)


def student_config(target: Any, layers: tuple[int, ...], width: int) -> Any:
    """The target's configuration with `layers` of its layers, `width` wide (0: as wide). Raises ConfigError."""
    text = target.get_text_config()
    if layers[-1] >= text.num_hidden_layers:
        raise ConfigError(
            f"layers: {layers[-1]} is not among the {text.num_hidden_layers} of the target, 0 being the first"
        )
    if getattr(text, "final_logit_softcapping", None):
        raise ModelUnsupported("kind: a target that caps its logits cannot lend its head to a draft")
    for name in ("logits_scaling", "logit_scale"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ModelUnsupported(f"kind: a target that scales its logits ({name}) cannot lend its head to a draft")
    config = copy.deepcopy(text)
    if (kinds := getattr(text, "layer_types", None)) is not None:
        config.layer_types = None
    config.num_hidden_layers = len(layers)
    if kinds is not None:
        config.layer_types = [kinds[layer] for layer in layers]
    config.tie_word_embeddings, config.pad_token_id = False, None
    if width and width != text.hidden_size:
        _narrow(config, width)
    return config


def read_draft(directory: Path, embedding_digest: str) -> dict[str, Tensor]:
    """Weights of a trained draft, by name, to start another one from. Raises ConfigError for one of another target."""
    manifest = read_manifest(load_config(directory)) if (directory / "config.json").is_file() else None
    if manifest is None:
        raise ConfigError(f"start: {directory} is no trained draft")
    if manifest.embedding_digest != embedding_digest:
        raise ConfigError(f"start: {directory} was trained for {manifest.target}, which has other embeddings")
    return load_file(directory / "model.safetensors")


def continue_from(student: Student, weights: dict[str, Tensor]) -> None:
    """Copies a trained draft's weights. Features that it did not know count for nothing yet. Raises ConfigError."""
    parameters = student.trained()
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name == FEATURE_PROJECTION and name not in weights:
                continue
            if name not in weights or weights[name].shape != parameter.shape:
                raise ConfigError(f"start: the draft has no {name} of the shape {tuple(parameter.shape)}")
            parameter.copy_(weights[name])
    if others := sorted(weights.keys() - parameters.keys() - {"head_ids"}):
        raise ConfigError(f"start: the draft has weights that this one lacks: {', '.join(others)}")


def _narrow(config: Any, width: int) -> None:
    """Scales heads and MLP with the width, the size of a head staying."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % head_dim:
        raise ConfigError(f"width: {width} is no multiple of a head's {head_dim}")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    num_heads = width // head_dim
    config.num_key_value_heads = next(
        n for n in range(max(1, num_heads * kv_heads // heads), 0, -1) if num_heads % n == 0
    )
    config.intermediate_size = config.intermediate_size * width // config.hidden_size
    config.num_attention_heads, config.hidden_size = num_heads, width


def start_from(student: Student, target_dir: Path, layers: tuple[int, ...], width: int) -> None:
    """Copies the weights of the target's `layers` and of what surrounds them; another width starts at random."""
    if width and width != student.embedding.shape[1]:
        return
    parameters = student.causal_parameters()
    with torch.no_grad():
        for name, found in read_layers(target_dir, parameters, layers).items():
            if found.shape != parameters[name].shape:
                raise ModelUnsupported(f"kind: the target's weight for {name} has the shape {tuple(found.shape)}")
            parameters[name].copy_(found)
