"""Loads a causal language model from a prepared directory, with the paged attention behind it.

Owns: what is read off a model besides its weights (limits, end-of-sequence ids, what its layers keep and ask for), and
the refusals that follow from it. Must not know: the pool, steps, sequences. No pickle, no code from a repository.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import core_model_loading
from transformers.distributed import DistributedConfig

from services.common.errors import ConfigError, ModelUnsupported
from services.engine import paged_attention, quantisation
from services.engine.feature_tap import FeatureTap
from services.engine.kv_pool import LayerShape
from services.engine.loading_bars import loading_bars
from services.engine.paged_attention import LayerCall, ProbeStep
from services.engine.progress import Reporter
from services.engine.trained_draft import load_trained_draft

if TYPE_CHECKING:
    from services.engine.cpu.kernels import Kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class CausalModel:
    """A loaded model. `module` is a transformers model in evaluation mode whose attention is the paged one."""

    module: Any
    dtype: torch.dtype
    device: torch.device
    layer_shapes: tuple[LayerShape, ...]
    layer_calls: tuple[LayerCall, ...]
    """What each layer asks of its attention, in order of the layers."""
    fold: int
    """Query heads that share a key head; the most, where layers differ."""
    vocab_size: int
    """Width of the logits, padding rows included."""
    eos_token_ids: frozenset[int]
    max_sequence_len: int
    """Most tokens of a sequence for which positions are the model's own."""
    keeps_logits: bool
    """Whether its call takes `logits_to_keep`."""
    kernels: Kernels | None = None
    """On a CPU, what computes its short steps."""
    tap: FeatureTap | None = None
    """Keeps the final hidden states of the rows of the last call, where there is one."""

    def logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, **extra: object
    ) -> torch.Tensor:
        """Logits (len(rows), vocab_size), in the model's dtype, of `rows` among tokens (n,) at `positions` (n,)."""
        call: dict[str, object] = {"input_ids": token_ids.unsqueeze(0), "position_ids": positions.unsqueeze(0)}
        if self.keeps_logits:
            call["logits_to_keep"] = rows
        logits: torch.Tensor = self.module(**call, use_cache=False, **extra).logits[0]
        return logits if self.keeps_logits else logits.index_select(0, rows)


def torch_dtype(name: str) -> torch.dtype:
    """Raises ConfigError for a name that is not among DTYPES."""
    if name not in DTYPES:
        raise ConfigError(f"dtype: {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_device(name: str) -> torch.device:
    """Raises ConfigError for a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is not a device") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is neither cpu nor cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name!r} is not there; {torch.cuda.device_count()} CUDA devices are")
    return device


def load_model(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    reporter: Reporter,
    *,
    num_ranks: int = 1,
    quantised: bool = False,
    target: Path | None = None,
) -> CausalModel:
    """Loads and probes the model in `directory`, or this rank's shard of it where `num_ranks` > 1.

    `quantised`: its linear layers keep int8 weights and compute in `dtype`. `target`: whose embedding it borrows, for a
    trained draft. Raises ModelUnsupported with the reason it cannot be run exactly.
    """
    paged_attention.register()
    stages = {core_model_loading: ""}
    with reporter.task(f"Loading {directory.name}") as advance, loading_bars(advance, stages):
        config = load_config(directory)
        if target is not None:
            module = load_trained_draft(directory, config, target, dtype, paged_attention.IMPLEMENTATION)
        else:
            module = _from_pretrained(directory, config, dtype, num_ranks)
        module = module.eval() if num_ranks > 1 else module.to(device).eval()
        if quantised:
            quantisation.quantise(module)
        # Only a warning about padded batches reads it, at the price of a look at the token ids in every step.
        module.config.pad_token_id = None
    return probe_model(module, dtype, device)


def _from_pretrained(directory: Path, config: Any, dtype: torch.dtype, num_ranks: int) -> Any:
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=paged_attention.IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            distributed_config=DistributedConfig(tp_size=num_ranks) if num_ranks > 1 else None,
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelUnsupported(f"{directory.name} cannot be loaded: {error}") from error


def load_config(directory: Path) -> Any:
    """The transformers configuration of the model in `directory`. Raises ModelUnsupported."""
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelUnsupported(f"{directory.name} cannot be loaded: {error}") from error
    _check_layer_types(config)
    return config


def probe_model(module: Any, dtype: torch.dtype, device: torch.device) -> CausalModel:
    """Reads off a transformers model what the engine must know, by one call over two tokens that keeps nothing."""
    probe = ProbeStep()
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    positions = torch.arange(2, device=device).unsqueeze(0)
    try:
        with torch.inference_mode():
            output = module(input_ids=tokens, position_ids=positions, use_cache=False, paged_step=probe)
    except (TypeError, ValueError) as error:
        raise ModelUnsupported(
            f"{type(module).__name__} does not take positions and extra keywords: {error}"
        ) from error
    config = module.config.get_text_config()
    _check_calls(type(module).__name__, config, probe)
    return CausalModel(
        module=module,
        dtype=dtype,
        device=device,
        layer_shapes=tuple(probe.shapes),
        layer_calls=tuple(probe.calls),
        fold=max(probe.folds),
        vocab_size=output.logits.shape[-1],
        eos_token_ids=_eos_token_ids(module),
        max_sequence_len=_max_sequence_len(config),
        keeps_logits="logits_to_keep" in inspect.signature(module.forward).parameters,
    )


def _check_layer_types(config: Any) -> None:
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if others := sorted(kinds - _ATTENTION_LAYERS):
        raise ModelUnsupported(f"its layers are not all causal attention: it has layers of type {', '.join(others)}")


def _check_calls(name: str, config: Any, probe: ProbeStep) -> None:
    """Every layer must attend once, through the interface, with the window that the configuration gives it."""
    if not probe.calls:
        raise ModelUnsupported(
            f"{name} never calls transformers' attention interface, so its attention cannot be paged"
        )
    layers = [call.layer for call in probe.calls]
    if layers != list(range(config.num_hidden_layers)):
        raise ModelUnsupported(
            f"{name} has {config.num_hidden_layers} layers but called the attention interface for layers {layers}: "
            "not every layer is causal attention of its own"
        )
    kinds = getattr(config, "layer_types", None)
    for call in probe.calls:
        sliding = kinds is None or kinds[call.layer] == "sliding_attention"
        window = getattr(config, "sliding_window", None) if sliding else None
        if call.window != window:
            raise ModelUnsupported(
                f"{name} asks for a window of {call.window} in layer {call.layer} where its configuration says {window}"
            )


def _eos_token_ids(module: Any) -> frozenset[int]:
    """Ends of sequence as `generate` knows them: those of the generation configuration, else of the model's own."""
    generation = getattr(module, "generation_config", None)
    ids = generation.eos_token_id if generation is not None else None
    if ids is None:
        ids = module.config.get_text_config().eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _max_sequence_len(config: Any) -> int:
    """The longest context at which a token's rotation depends on its own position alone.

    Dynamic NTK and LongRoPE recompute the frequencies of a whole batch once its longest position passes the length of
    pre-training; up to there they are fixed, and no sequence can change another's.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        raise ModelUnsupported("its configuration does not say how many positions it has (max_position_embeddings)")
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        original = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") in ("longrope", "dynamic") and original is not None:
            limit = min(limit, int(original))
    return int(limit)
