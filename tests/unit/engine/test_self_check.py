"""The comparison at load passes models that are computed exactly and refuses those that are not."""

from __future__ import annotations

import pytest
import torch

from services.common.errors import ModelUnsupported
from services.engine.kv_pool import KvPool
from services.engine.models import CausalModel, probe_model
from services.engine.paged_attention import IMPLEMENTATION, LayerCall, PagedStep, register
from services.engine.self_check import TOLERANCE, self_check
from tests.tiny_models import SUPPORTED_FAMILIES, build_model


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def tiny(family: str, dtype: torch.dtype = torch.float32, **arguments: int) -> CausalModel:
    register()
    module = build_model(family, **arguments).to(dtype)
    module.set_attn_implementation(IMPLEMENTATION)
    module.config.pad_token_id = None
    return probe_model(module, dtype, torch.device("cpu"))


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_supported_families_pass(family: str) -> None:
    assert self_check(tiny(family, sliding_window=9), block_size=4) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_types_pass_with_the_tolerance_of_theirs(dtype: torch.dtype) -> None:
    difference = self_check(tiny("llama", dtype), block_size=16)
    assert 1e-5 < difference <= TOLERANCE[dtype]


def test_the_paged_attention_is_in_place_again_afterwards() -> None:
    model = tiny("llama")
    self_check(model, block_size=16)
    assert model.module.config._attn_implementation == IMPLEMENTATION


def test_a_model_whose_own_attention_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = PagedStep.attend

    def unscaled(self: PagedStep, call: LayerCall, *tensors: torch.Tensor) -> torch.Tensor:
        return attend(self, call._replace(scaling=1.0), *tensors)

    model = tiny("llama")
    monkeypatch.setattr(PagedStep, "attend", unscaled)
    with pytest.raises(ModelUnsupported, match="LlamaForCausalLM through the paged attention differs"):
        self_check(model, block_size=16)


def test_a_rejected_tail_that_is_not_overwritten_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    write = KvPool.write
    written: set[tuple[int, int, int]] = set()

    def once(self: KvPool, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        fresh = torch.tensor([(id(self), layer, slot) not in written for slot in slots.tolist()])
        written.update((id(self), layer, slot) for slot in slots.tolist())
        write(self, layer, slots[fresh], keys[fresh], values[fresh])

    model = tiny("llama")
    monkeypatch.setattr(KvPool, "write", once)
    with pytest.raises(ModelUnsupported, match="differs"):
        self_check(model, block_size=16)


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.module.lm_head.weight[5] = torch.nan
    with pytest.raises(ModelUnsupported, match="differs"):
        self_check(model, block_size=16)


def test_a_model_with_too_few_positions_is_refused() -> None:
    with pytest.raises(ModelUnsupported, match="has 32 positions"):
        self_check(tiny("llama", max_len=32), block_size=16)
