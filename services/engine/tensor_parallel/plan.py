"""Which models can be cut into how many shards, told from the configuration alone, before any process is started.

Owns: the refusals. Must not know: processes, weights.
"""

from __future__ import annotations

from typing import Any

import torch

from services.common.errors import ConfigError, ModelUnsupported


def check_model(config: Any, size: int) -> None:
    """`config` is a transformers configuration. Raises ModelUnsupported where it cannot be cut into `size` shards."""
    text = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelUnsupported(
            f"tensor_parallel_size: transformers has no tensor-parallel plan for models of type {config.model_type}"
        )
    num_heads = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    for name, num in (("attention heads", num_heads), ("key-value heads", num_kv_heads)):
        if num % size:
            raise ModelUnsupported(f"tensor_parallel_size: {num} {name} cannot be divided among {size} ranks")


def check_device(device: torch.device, size: int) -> None:
    """Raises ConfigError where `size` ranks cannot run on devices of this kind."""
    accelerator = torch.accelerator.current_accelerator(check_available=False)
    kind = "cpu" if accelerator is None else accelerator.type
    if kind != device.type:
        raise ConfigError(
            f"device: this build of torch shards models over {kind} devices only, but the device is {device.type}"
        )
    if str(device) != device.type:
        raise ConfigError(
            f"device: {device} names one device, but {size} ranks take one each; say cuda, and choose the devices by "
            "CUDA_VISIBLE_DEVICES"
        )
    if device.type == "cuda" and (num := torch.cuda.device_count()) < size:
        raise ConfigError(f"tensor_parallel_size: {size} ranks need a GPU each; there are {num}")
