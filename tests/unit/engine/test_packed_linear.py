"""Packed linear layers give the plain ones' results in bfloat16 and take their place; float32 is left alone."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers

from services.common.errors import ModelUnsupported
from services.engine.memory import module_bytes
from services.engine.packed_linear import PackedLinear, can_pack, pack_linear_layers
from services.engine.paged_model import EngineOptions, PagedEngine, load_engine, spec_of
from services.engine.progress import Reporter
from services.engine.self_check import TOLERANCE
from tests.tiny_models import SUPPORTED_FAMILIES, build_model, save_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="this processor packs no bfloat16 weights")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def linear_types(module: torch.nn.Module) -> set[type]:
    return {type(part) for part in module.modules()} & {
        torch.nn.Linear,
        transformers.pytorch_utils.Conv1D,
        PackedLinear,
    }


def load(directory: Path, dtype: str) -> PagedEngine:
    return load_engine(EngineOptions(str(directory), directory, dtype=dtype, num_blocks=16), Reporter(quiet=True))


@pytest.mark.parametrize("num_rows", [0, 1, 3, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_equals_the_plain_one(num_rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(48, 40, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, num_rows, 48, generator=generator).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer.weight, layer.bias)(x), layer(x), atol=1e-2, rtol=1e-2)


def test_a_packed_layer_takes_inputs_that_are_not_contiguous() -> None:
    layer = torch.nn.Linear(48, 40, dtype=torch.bfloat16)
    packed = PackedLinear(layer.weight, layer.bias)
    x = torch.randn(2, 6, 96).bfloat16().transpose(0, 1)[::2, :, ::2]
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), layer(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_linear_layer_of_a_family_is_packed_and_its_logits_stay(family: str) -> None:
    module = build_model(family).to(torch.bfloat16)
    tokens = torch.arange(5, 65).unsqueeze(0)
    with torch.inference_mode():
        expected = module(input_ids=tokens).logits.float()
        assert pack_linear_layers(module) > 0
        found = module(input_ids=tokens).logits.float()
    assert linear_types(module) == {PackedLinear}
    assert (found - expected).abs().max() <= TOLERANCE[torch.bfloat16] * expected.abs().max()


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_a_packed_family_passes_the_check_at_load(tmp_path: Path, family: str) -> None:
    engine = load(save_model(tmp_path, family), "bfloat16")
    assert linear_types(engine.runner.model.module) == {PackedLinear}


def test_the_check_at_load_sees_the_packed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PackedLinear.forward
    # Wrong where a step has more tokens than one sequence has, which only the paged side does.
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: plain(self, x) * (1 if x.shape[1] in (60, 24) else 2))
    with pytest.raises(ModelUnsupported, match="differs from its own attention"):
        load(save_model(tmp_path), "bfloat16")


def test_float32_keeps_its_modules(tmp_path: Path) -> None:
    assert linear_types(load(save_model(tmp_path), "float32").runner.model.module) == {torch.nn.Linear}


@pytest.mark.parametrize(("options", "packs"), [({}, True), ({"compile": True}, False), ({"num_ranks": 2}, False)])
def test_neither_compiled_modules_nor_shards_are_packed(options: dict[str, object], packs: bool) -> None:
    assert spec_of(EngineOptions("m", Path("m"), dtype="bfloat16", **options), Path("m")).packs is packs


def test_packing_takes_no_more_memory_than_the_plain_weights() -> None:
    module = build_model().to(torch.bfloat16)
    before = module_bytes(module)
    weights = [weakref.ref(part.weight) for part in module.modules() if isinstance(part, torch.nn.Linear)]
    pack_linear_layers(module)
    gc.collect()
    assert module_bytes(module) == before
    assert not any(weight() is not None for weight in weights)


def test_each_plain_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_model().to(torch.bfloat16)
    weights = [weakref.ref(part.weight) for part in module.modules() if isinstance(part, torch.nn.Linear)]
    packed, alive = PackedLinear.__init__, []

    def counting(self: PackedLinear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        packed(self, weight, bias)
        alive.append(sum(weight() is not None for weight in weights))

    monkeypatch.setattr(PackedLinear, "__init__", counting)
    pack_linear_layers(module)
    assert alive == list(range(len(weights), 0, -1))


def test_an_embedding_tied_to_a_packed_head_still_looks_up_its_rows() -> None:
    module = build_model().to(torch.bfloat16)
    module.lm_head.weight = module.model.embed_tokens.weight
    rows = module.model.embed_tokens.weight.clone()
    pack_linear_layers(module)
    assert isinstance(module.lm_head, PackedLinear)
    assert torch.equal(module.model.embed_tokens(torch.arange(320)), rows)


def test_a_subclass_with_a_forward_of_its_own_stays() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = torch.nn.Sequential(Doubled(8, 8, dtype=torch.bfloat16))
    assert pack_linear_layers(module) == 0
    assert type(module[0]) is Doubled


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_not_packed(dtype: torch.dtype) -> None:
    assert not can_pack(dtype, CPU)


def test_other_devices_are_not_packed() -> None:
    assert not can_pack(torch.bfloat16, torch.device("cuda"))
