"""Fused parts give what the model's own give, for every family, and what they cannot give stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from services.engine.fused import FusedAttention, FusedMlp, FusedNorm, fuse
from services.engine.models import CausalModel, probe_model
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.self_check import reference_of, self_check
from tests.tiny_models import SUPPORTED_FAMILIES, build_model

NUM_LAYERS = 2
FUSED = {
    "llama": {FusedAttention, FusedMlp, FusedNorm},
    "qwen2": {FusedAttention, FusedMlp, FusedNorm},
    "qwen3": {FusedAttention, FusedMlp, FusedNorm},
    "mistral": {FusedAttention, FusedMlp, FusedNorm},
    "gemma2": {FusedAttention, FusedMlp, FusedNorm},
    "gemma3": {FusedAttention, FusedMlp, FusedNorm},
    "phi3": {FusedNorm},
    "gpt2": set(),
    "opt": set(),
    "gpt_neox": set(),
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, **arguments: int) -> CausalModel:
    register()
    module = build_model(family, **arguments).to(dtype)
    module.set_attn_implementation(IMPLEMENTATION)
    module.config.pad_token_id = None
    return probe_model(module, dtype, torch.device("cpu"))


def fused_types(module: Any) -> set[type]:
    return {type(part) for part in module.modules()} & {FusedAttention, FusedMlp, FusedNorm}


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_a_fused_family_gives_its_own_logits(family: str) -> None:
    model = tiny(family, sliding_window=9)
    reference = reference_of(model)
    fuse(model)
    assert fused_types(model.module) == FUSED[family]
    assert self_check(model, 4, reference) < 1e-5


def test_bfloat16_is_fused_within_its_tolerance() -> None:
    model = tiny(dtype=torch.bfloat16)
    reference = reference_of(model)
    assert fuse(model) == 4 * NUM_LAYERS + 1
    assert self_check(model, 16, reference) < 5e-2


@pytest.mark.parametrize(
    ("part", "kept"),
    [("input_layernorm", FusedNorm), ("mlp", FusedMlp), ("self_attn", FusedAttention)],
)
def test_a_part_that_computes_something_else_under_the_same_names_stays(part: str, kept: type) -> None:
    model = tiny()
    odd = getattr(model.module.model.layers[1], part)
    plain = odd.forward

    def scaled(*arguments: Any, **keywords: Any) -> Any:
        output = plain(*arguments, **keywords)
        return (output[0] * 1.01, None) if isinstance(output, tuple) else output * 1.01

    odd.forward = scaled
    reference = reference_of(model)
    fuse(model)
    assert getattr(model.module.model.layers[1], part) is odd
    assert isinstance(getattr(model.module.model.layers[0], part), kept)
    assert self_check(model, 16, reference) < 1e-5


def test_projections_of_which_only_some_have_a_bias_stay() -> None:
    model = tiny()
    attention = model.module.model.layers[0].self_attn
    attention.k_proj.bias = torch.nn.Parameter(torch.randn(attention.k_proj.out_features))
    fuse(model)
    assert model.module.model.layers[0].self_attn is attention


def test_norm_of_rows_that_are_zero_is_zero() -> None:
    norm = FusedNorm(torch.ones(8), 1e-6)
    assert torch.equal(norm(torch.zeros(1, 2, 8)), torch.zeros(1, 2, 8))
