"""Linear layers on a CPU, their weights laid out once for the kernels of the processor at hand.

Owns: which modules of a loaded model are replaced, and by what. Must not know: families of models, the pool, steps.

A product by a weight in its plain layout has the library rearrange the weight in every call; with few rows that costs
more than the product. Two kernels take packed weights:

    oneDNN      where the processor computes in bfloat16 (AVX-512, AMX): bfloat16 in and out
    FBGEMM      elsewhere (AVX2): float32 in and out, the weights widened as they are read, so that a step still reads
                two bytes a weight. bfloat16 arithmetic would be emulated there, row by row

FBGEMM keeps half precision: 10 bits behind the leading one to bfloat16's 7, so that of a bfloat16 weight nothing is
lost down to 2^-14, below that at most 2^-25 absolute. A layer with a weight beyond half precision stays as it is.

The packed copy takes the plain weight's place and memory, except that a head tied to the input embedding becomes a copy
of its own: the embedding is looked up by rows, which the packed layout does not give. Results equal the plain layers'
up to the order of summation, as those of plain layers do between numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

MAX_HALF = 65504.0


class PackedLinear(torch.nn.Module):
    """x (..., in_features) to x @ weight.T + bias, (..., out_features), for a weight (out_features, in_features)."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self._product = torch.ops.mkldnn._linear_pointwise.default._op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._product(x, self.weight, self.bias, "none", [], "")
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class HalfLinear(torch.nn.Module):
    """As PackedLinear, for float32 rows and a weight in half precision."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.has_bias = bias is not None
        self.packed_bytes = weight.numel() * 2 + (0 if bias is None else bias.numel() * 4)
        plain_bias = None if bias is None else bias.detach().float()
        self._packed: Any = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), plain_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, self._packed)
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}"


Layer = Callable[[torch.Tensor, torch.Tensor | None], torch.nn.Module]


def packed_layer(dtype: torch.dtype, device: torch.device) -> type[PackedLinear] | type[HalfLinear] | None:
    """What takes the place of linear layers in `dtype`; None: this processor and build of torch have nothing better."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    if torch._C._has_mkldnn and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return PackedLinear
    return HalfLinear if dtype == torch.bfloat16 and "fbgemm" in torch.backends.quantized.supported_engines else None


@torch.inference_mode(False)
def pack_linear_layers(module: torch.nn.Module, layer: Layer) -> int:
    """Replaces, in place and one after another, all linear layers of `module`; returns how many.

    At no time more than one weight exists twice. Subclasses of torch.nn.Linear, whose forward may be another, stay.
    """
    parents = [parent for parent in module.modules() if any(True for _ in parent.children())]
    num_packed = 0
    for parent in parents:
        for name in [name for name, _ in parent.named_children()]:
            replacement = _packed(parent.get_submodule(name), layer)
            if replacement is not None:
                setattr(parent, name, replacement)
                num_packed += 1
    return num_packed


def _packed(module: torch.nn.Module, layer: Layer) -> torch.nn.Module | None:
    """The replacement of a linear layer, in either of the layouts that transformers uses; None for other modules."""
    if isinstance(module, torch.nn.Linear) and type(module) is torch.nn.Linear:
        weight = module.weight
    elif isinstance(module, Conv1D):  # GPT-2's, whose weight is (in_features, out_features)
        weight = module.weight.T
    else:
        return None
    if layer is HalfLinear and not float(weight.detach().abs().max()) <= MAX_HALF:
        return None
    return layer(weight, module.bias)
