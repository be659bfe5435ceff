"""Linear layers on a CPU, in bfloat16 as a rule, with weights laid out once for oneDNN's kernels.

Owns: which modules of a loaded model are replaced, and by what. Must not know: families of models, the pool, steps.

A product by a weight in its plain layout has oneDNN (or BLAS) rearrange the weight in every call; with few rows that
costs more than the product. The packed copy takes the plain weight's place and memory, except that a head tied to the
input embedding becomes a copy of its own: the embedding is looked up by rows, which the packed layout does not give.
Results equal the plain layers' up to the order of summation, so float32, in which tokens are promised to be those of
the plain model, is left as it is.
"""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D

PACKED_DTYPE = torch.bfloat16


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this processor and this build of torch multiply packed weights of `dtype`."""
    return (
        device.type == "cpu"
        and dtype == PACKED_DTYPE
        and torch._C._has_mkldnn
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.inference_mode(False)
def pack_linear_layers(module: torch.nn.Module) -> int:
    """Replaces, in place and one after another, all linear layers of `module`; returns how many.

    At no time more than one weight exists twice. Subclasses of torch.nn.Linear, whose forward may be another, stay.
    """
    parents = [parent for parent in module.modules() if any(True for _ in parent.children())]
    num_packed = 0
    for parent in parents:
        for name in [name for name, _ in parent.named_children()]:
            replacement = _packed(parent.get_submodule(name))
            if replacement is not None:
                setattr(parent, name, replacement)
                num_packed += 1
    return num_packed


def _packed(module: torch.nn.Module) -> PackedLinear | None:
    """The replacement of a linear layer, in either of the layouts that transformers uses; None for other modules."""
    if isinstance(module, torch.nn.Linear) and type(module) is torch.nn.Linear:
        return PackedLinear(module.weight, module.bias)
    if isinstance(module, Conv1D):  # GPT-2's, whose weight is (in_features, out_features)
        return PackedLinear(module.weight.T, module.bias)
    return None
