"""Makes a loaded model fast on a CPU.

Owns: the order of it, and the type that steps are computed in afterwards. Must not know: the pool, steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from services.engine.flat_decoder import flatten
from services.engine.fused import fuse, use_kernels
from services.engine.models import CausalModel
from services.engine.packed_linear import HalfLinear, pack_linear_layers, packed_layer


def pack(model: CausalModel) -> CausalModel:
    """Replaces parts of a model on a CPU in place. Other devices' models stay.

    Where bfloat16 weights are multiplied in float32, so is everything else computed, and keys and values are kept so.
    """
    if model.device.type != "cpu":
        return model
    fuse(model)
    layer = packed_layer(model.dtype, model.device)
    if layer is not None:
        pack_linear_layers(model.module, layer)
    if layer is HalfLinear:
        model = replace(model, module=model.module.float(), dtype=torch.float32)
    flatten(model)
    return use_kernels(model)
