"""Leaner equivalents of the small parts of a model on a CPU, where a step's cost is the number of its operations.

Owns: which parts are replaced, and the proof of each. Must not know: families of models, the pool, steps.

Replaced are RMS norms (Zhang and Sennrich 2019, "Root mean square layer normalization"), gated MLPs, whose two first
products become one, and attentions with separate projections, whose three become one and whose queries and keys are
rotated together (Su et al. 2021, RoFormer). A part is recognised by its members' names, and replaced only where the
replacement gives what the part gave in a call of the whole model; so a family that computes something else under the
same names keeps its own.
Weights are merged one part after another: at no time does more than one part exist twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from services.engine.cpu.loading import load_kernels
from services.engine.models import CausalModel
from services.engine.paged_attention import AttentionStep, LayerCall, ProbeStep, Rotation

if TYPE_CHECKING:
    from services.engine.cpu.kernels import Kernels

NUM_PROBE_ROWS = 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of a replaced part's output, relative to the largest of the original's."""

SEED = 7
MAX_KERNEL_VALUES = 1 << 16
"""Of a kernel's input: it has one thread, torch's operations have them all."""


def _suits_kernels(x: torch.Tensor) -> bool:
    return x.numel() <= MAX_KERNEL_VALUES and x.is_contiguous()


class FusedNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, as x / hypot(|x|, sqrt(eps * n)) * (weight * sqrt(n)), in float32."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        num = weight.shape[0]
        self.register_buffer("weight", weight.detach().float() * num**0.5, persistent=False)
        self.register_buffer("floor", torch.tensor([(eps * num) ** 0.5]), persistent=False)
        self._square_floor = eps * num

    weight: torch.Tensor
    floor: torch.Tensor
    kernels: Kernels | None = None

    def of_sum(self, hidden: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """The norm of hidden + delta, which `hidden` becomes."""
        if self.kernels is not None and _suits_kernels(hidden) and delta.is_contiguous():
            return self._by_kernel(self.kernels, hidden, delta.data_ptr())
        return self.forward(hidden.add_(delta))

    def _by_kernel(self, kernels: Kernels, hidden: torch.Tensor, delta_address: int) -> torch.Tensor:
        out, width = torch.empty_like(hidden), hidden.shape[-1]
        kernels.add_rms_norm(
            hidden.data_ptr(),
            delta_address,
            self.weight.data_ptr(),
            out.data_ptr(),
            hidden.numel() // width,
            width,
            self._square_floor,
        )
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernels is not None and _suits_kernels(x):
            return self._by_kernel(self.kernels, x, 0)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return torch.div(x, torch.hypot(length, self.floor)).mul_(self.weight).to(x.dtype)


class FusedMlp(torch.nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up in one product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj = _merged([mlp.gate_proj, mlp.up_proj])
        self.down_proj = mlp.down_proj
        self.act_fn = F.silu if type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") else mlp.act_fn

    kernels: Kernels | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up_proj.forward(x)
        if self.kernels is not None and self.act_fn is F.silu and _suits_kernels(gate_up):
            return self._by_kernel(self.kernels, gate_up)
        gate, up = gate_up.chunk(2, -1)
        down: torch.Tensor = self.down_proj(self.act_fn(gate).mul_(up))
        return down

    def _by_kernel(self, kernels: Kernels, gate_up: torch.Tensor) -> torch.Tensor:
        width = gate_up.shape[-1] // 2
        product = gate_up.new_empty(*gate_up.shape[:-1], width)
        kernels.silu_and_mul(gate_up.data_ptr(), product.data_ptr(), product.numel() // width, width)
        down: torch.Tensor = self.down_proj.forward(product)
        return down


class FusedAttention(torch.nn.Module):
    """An attention with rotary positions behind the paged step; norms of queries and keys stay as they are."""

    def __init__(self, attention: Any, call: LayerCall) -> None:
        super().__init__()
        self.qkv_proj = _merged([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.layer_idx: int = attention.layer_idx
        self._call = call
        dim = attention.head_dim
        self._dim, self._num_heads = dim, attention.q_proj.out_features // dim
        self._num_kv_heads = attention.k_proj.out_features // dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        paged_step: AttentionStep,
        **others: object,
    ) -> tuple[torch.Tensor, None]:
        return self.attend(hidden_states, paged_step.rotation(position_embeddings), paged_step), None

    def attend(self, hidden: torch.Tensor, rotation: Rotation, step: AttentionStep) -> torch.Tensor:
        """As `forward`, for a step's rotation that is at hand."""
        heads = self.qkv_proj.forward(hidden).view(-1, self._num_heads + 2 * self._num_kv_heads, self._dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key, value = heads.split_with_sizes((self._num_heads, self._num_kv_heads, self._num_kv_heads), 1)
            heads = torch.cat((self.q_norm(query), self.k_norm(key), value), 1)
        attended = step.attend_heads(self._call, heads, self._num_heads, rotation)
        output: torch.Tensor = self.o_proj.forward(attended.view(1, len(attended), -1))
        return output


class MixingStep(ProbeStep):
    """Answers with something that depends on all that a layer hands over."""

    def attend(self, call: LayerCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        zeros = super().attend(call, query, key, value)
        if key.shape[2] != value.shape[2]:
            return zeros
        fold = query.shape[1] // key.shape[1]
        return query + (key * 0.5 + value * 0.25).repeat_interleave(fold, 1)


class _Example(NamedTuple):
    """One call of a part within the model's own."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any


@torch.inference_mode(False)
@torch.no_grad()
def fuse(model: CausalModel) -> int:
    """Replaces parts of the model in place; returns how many. Its attention must be the paged one."""
    candidates = [part for part in model.module.modules() if _is_candidate(part)]
    examples = _examples(model, candidates)
    num_fused = 0
    for parent in reversed(list(model.module.modules())):  # inner parts first
        for name, part in list(parent.named_children()):
            for replacement in _replacements(part, model):
                if part in examples and _agrees(replacement, examples[part], TOLERANCE[model.dtype]):
                    setattr(parent, name, replacement)
                    num_fused += 1
                    break
    return num_fused


def use_kernels(model: CausalModel) -> CausalModel:
    """Has compiled kernels compute short steps, where there are any for the model's type. Parts are fused before."""
    kernels = load_kernels(model.dtype)
    for part in model.module.modules():
        if isinstance(part, FusedNorm | FusedMlp):
            part.kernels = kernels
    return replace(model, kernels=kernels)


def _examples(model: CausalModel, parts: list[torch.nn.Module]) -> dict[torch.nn.Module, _Example]:
    """What each part got and gave in one call of the model over random tokens."""
    found: dict[torch.nn.Module, _Example] = {}

    def keep(part: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        found[part] = _Example(arguments, keywords, output)

    handles = [part.register_forward_hook(keep, with_kwargs=True) for part in parts]
    tokens = torch.randint(model.vocab_size, (NUM_PROBE_ROWS,), generator=torch.Generator().manual_seed(SEED))
    try:
        positions = torch.arange(NUM_PROBE_ROWS) + 1
        model.logits(tokens, positions, positions[:1], paged_step=MixingStep())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _agrees(replacement: torch.nn.Module, example: _Example, tolerance: float) -> bool:
    """Whether it gives what the original gave, and asks the same of the attention."""
    found_calls, expected_calls = MixingStep(), example.keywords.get("paged_step")
    keywords = example.keywords | ({"paged_step": found_calls} if expected_calls is not None else {})
    try:
        found = replacement(*example.arguments, **keywords)
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = example.output
    if isinstance(expected, tuple):
        found, expected = found[0], expected[0]
    if isinstance(expected_calls, ProbeStep) and not set(found_calls.calls) <= set(expected_calls.calls):
        return False
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= tolerance * expected.float().abs().max())


def _is_candidate(part: Any) -> bool:
    return _is_norm(part) or _is_gated_mlp(part) or _is_attention(part)


def _is_norm(part: Any) -> bool:
    weight = getattr(part, "weight", None)
    return "RMSNorm" in type(part).__name__ and isinstance(weight, torch.Tensor) and weight.dim() == 1


def _is_gated_mlp(part: Any) -> bool:
    return hasattr(part, "act_fn") and _has_layers(part, "gate_proj", "up_proj", "down_proj")


def _is_attention(part: Any) -> bool:
    named = hasattr(part, "head_dim") and hasattr(part, "layer_idx")
    return named and _has_layers(part, "q_proj", "k_proj", "v_proj", "o_proj")


def _has_layers(part: Any, *names: str) -> bool:
    return all(type(getattr(part, name, None)) is torch.nn.Linear for name in names)


def _replacements(part: Any, model: CausalModel) -> Iterator[torch.nn.Module]:
    """What may take the place of a part, the likelier first."""
    if _is_norm(part):
        eps = getattr(part, "variance_epsilon", getattr(part, "eps", 0.0))
        yield FusedNorm(part.weight, eps)
        yield FusedNorm(part.weight.float() + 1.0, eps)  # some families keep the weight less one
    elif _is_gated_mlp(part):
        yield FusedMlp(part)
    elif _is_attention(part):
        yield FusedAttention(part, model.layer_calls[part.layer_idx])


def _merged(layers: list[torch.nn.Linear]) -> torch.nn.Linear:
    """One layer whose outputs are those of `layers`, one after the other."""
    weights: list[torch.Tensor] = [layer.weight for layer in layers]
    biases: list[torch.Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    with torch.device("meta"):
        merged = torch.nn.Linear(layers[0].in_features, sum(map(len, weights)), bias=False)
    merged.weight = torch.nn.Parameter(torch.cat(weights), requires_grad=False)
    if len(biases) == len(layers):
        merged.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False)
    return merged
