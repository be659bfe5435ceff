"""Packed linear layers give the plain ones' results and take their place."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers

from services.common.errors import ModelUnsupported
from services.engine.memory import module_bytes
from services.engine.packed_linear import HalfLinear, PackedLinear, pack_linear_layers, packed_layer
from services.engine.paged_model import EngineOptions, PagedEngine, load_engine, spec_of
from services.engine.progress import Reporter
from services.engine.self_check import TOLERANCE
from tests.tiny_models import SUPPORTED_FAMILIES, build_model, save_model

CPU = torch.device("cpu")
LAYER = packed_layer(torch.bfloat16, CPU)
pytestmark = pytest.mark.skipif(LAYER is None, reason="this build of torch packs no weights")
KINDS = [
    pytest.param(
        PackedLinear,
        torch.bfloat16,
        marks=pytest.mark.skipif(LAYER is not PackedLinear, reason="this processor has no bfloat16 products"),
    ),
    (PackedLinear, torch.float32),
    (HalfLinear, torch.float32),
]
"""Layers, and what goes into them and comes out."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def linear_types(module: torch.nn.Module) -> set[type]:
    return {type(part) for part in module.modules()} & {
        torch.nn.Linear,
        transformers.pytorch_utils.Conv1D,
        PackedLinear,
        HalfLinear,
    }


def load(directory: Path, dtype: str) -> PagedEngine:
    return load_engine(EngineOptions(str(directory), directory, dtype=dtype, num_blocks=16), Reporter(quiet=True))


@pytest.mark.parametrize("num_rows", [0, 1, 3, 17])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_packed_layer_equals_the_plain_one(kind: type, dtype: torch.dtype, bias: bool, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(48, 40, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(1, num_rows, 48, generator=generator).to(dtype)
    layer = layer.to(dtype) if kind is PackedLinear else layer
    with torch.inference_mode():
        found = kind(layer.weight, layer.bias)(x)
        assert found.dtype == dtype
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, layer.to(dtype)(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_packed_layer_takes_inputs_that_are_not_contiguous(kind: type, dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(48, 40, dtype=dtype if kind is PackedLinear else torch.bfloat16)
    packed = kind(layer.weight, layer.bias)
    x = torch.randn(2, 6, 96).to(dtype).transpose(0, 1)[::2, :, ::2]
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), layer.to(dtype)(x), atol=1e-2, rtol=1e-2)


def test_a_bfloat16_weight_survives_half_precision_down_to_its_smallest_normal() -> None:
    weight = torch.tensor([[2.0**-14 * 1.984375, 1.0078125, -60000.0, 2.0**-20, 1e-30]]).bfloat16()
    with torch.inference_mode():
        found = HalfLinear(weight, None)(torch.eye(5))
    torch.testing.assert_close(found[:3, 0], weight[0, :3].float(), atol=0, rtol=0)
    assert (found[3:, 0] - weight[0, 3:].float()).abs().max() <= 2.0**-25


@pytest.mark.parametrize("value", [65536.0, float("inf"), float("nan")])
def test_a_weight_beyond_half_precision_stays(value: float) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, dtype=torch.bfloat16))
    with torch.no_grad():
        module[0].weight[1, 2] = value
    assert pack_linear_layers(module, HalfLinear) == 0
    assert type(module[0]) is torch.nn.Linear


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_linear_layer_of_a_family_is_packed_and_its_logits_stay(family: str) -> None:
    module = build_model(family).to(torch.bfloat16)
    tokens = torch.arange(5, 65).unsqueeze(0)
    with torch.inference_mode():
        expected = module(input_ids=tokens).logits.float()
        assert pack_linear_layers(module, LAYER) > 0
        found = (module.float() if LAYER is HalfLinear else module)(input_ids=tokens).logits.float()
    assert linear_types(module) == {LAYER}
    assert (found - expected).abs().max() <= TOLERANCE[torch.bfloat16] * expected.abs().max()


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_a_packed_family_passes_the_check_at_load(tmp_path: Path, family: str) -> None:
    engine = load(save_model(tmp_path, family), "bfloat16")
    assert linear_types(engine.runner.model.module) == {LAYER}


def test_the_check_at_load_sees_the_packed_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LAYER.forward
    monkeypatch.setattr(LAYER, "forward", lambda self, x: plain(self, x) * 1.5)
    with pytest.raises(ModelUnsupported, match="differs from its own attention"):
        load(save_model(tmp_path), "bfloat16")


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_float32_is_packed_and_passes_the_check_at_load(tmp_path: Path, family: str) -> None:
    engine = load(save_model(tmp_path, family), "float32")
    assert linear_types(engine.runner.model.module) == {PackedLinear}
    assert engine.self_check_difference < 1e-5


@pytest.mark.parametrize(("options", "packs"), [({}, True), ({"compile": True}, False), ({"num_ranks": 2}, False)])
def test_neither_compiled_modules_nor_shards_are_packed(options: dict[str, object], packs: bool) -> None:
    assert spec_of(EngineOptions("m", Path("m"), dtype="bfloat16", **options), Path("m")).packs is packs


def test_packing_takes_no_more_memory_than_the_plain_weights() -> None:
    module = build_model().to(torch.bfloat16)
    before = module_bytes(module)
    weights = [weakref.ref(part.weight) for part in module.modules() if isinstance(part, torch.nn.Linear)]
    pack_linear_layers(module, LAYER)
    gc.collect()
    assert module_bytes(module) == before
    assert not any(weight() is not None for weight in weights)


def test_each_plain_weight_is_freed_before_the_next_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_model().to(torch.bfloat16)
    weights = [weakref.ref(part.weight) for part in module.modules() if isinstance(part, torch.nn.Linear)]
    packed, alive = LAYER.__init__, []

    def counting(self: torch.nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        packed(self, weight, bias)
        alive.append(sum(weight() is not None for weight in weights))

    monkeypatch.setattr(LAYER, "__init__", counting)
    pack_linear_layers(module, LAYER)
    assert alive == list(range(len(weights), 0, -1))


def test_an_embedding_tied_to_a_packed_head_still_looks_up_its_rows() -> None:
    module = build_model().to(torch.bfloat16)
    module.lm_head.weight = module.model.embed_tokens.weight
    rows = module.model.embed_tokens.weight.clone()
    pack_linear_layers(module, LAYER)
    assert isinstance(module.lm_head, LAYER)
    assert torch.equal(module.model.embed_tokens(torch.arange(320)), rows)


def test_a_subclass_with_a_forward_of_its_own_stays() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = torch.nn.Sequential(Doubled(8, 8, dtype=torch.bfloat16))
    assert pack_linear_layers(module, LAYER) == 0
    assert type(module[0]) is Doubled


def test_other_dtypes_are_not_packed() -> None:
    assert packed_layer(torch.float16, CPU) is None


def test_other_devices_are_not_packed() -> None:
    assert packed_layer(torch.bfloat16, torch.device("cuda")) is None
