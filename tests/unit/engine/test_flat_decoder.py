"""A decoder in one loop gives its own logits, and one that computes something else keeps its own call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.common.errors import ModelUnsupported
from services.engine import flat_decoder
from services.engine.flat_decoder import FlatDecoder, flatten
from services.engine.fused import fuse
from services.engine.models import CausalModel, probe_model
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from services.engine.self_check import reference_of, self_check
from tests.tiny_models import SUPPORTED_FAMILIES, build_model, save_model

FLAT = {"llama", "qwen2", "qwen3", "mistral"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def tiny(family: str = "llama", **arguments: int) -> CausalModel:
    register()
    module = build_model(family, **arguments)
    module.set_attn_implementation(IMPLEMENTATION)
    module.config.pad_token_id = None
    return probe_model(module, torch.float32, torch.device("cpu"))


def is_flat(module: Any) -> bool:
    return any(isinstance(getattr(part.forward, "__self__", None), FlatDecoder) for part in module.modules())


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_a_family_of_plain_residual_layers_is_flat_and_gives_its_own_logits(family: str) -> None:
    model = tiny(family, sliding_window=9)
    reference = reference_of(model)
    fuse(model)
    assert flatten(model) is is_flat(model.module) is (family in FLAT)
    assert self_check(model, 4, reference) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FLAT))
def test_a_loaded_engine_serves_and_checks_the_flat_decoder(tmp_path: Path, family: str, dtype: str) -> None:
    options = EngineOptions(str(save_model(tmp_path, family)), tmp_path, dtype=dtype, num_blocks=16)
    engine = load_engine(options, Reporter(quiet=True))
    assert is_flat(engine.runner.model.module)
    assert engine.self_check_difference < (1e-5 if dtype == "float32" else 5e-2)


def test_the_check_at_load_sees_the_flat_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FlatDecoder.forward

    def scaled(self: FlatDecoder, *arguments: Any, **keywords: Any) -> Any:
        output = plain(self, *arguments, **keywords)
        output.last_hidden_state *= 1.5
        return output

    monkeypatch.setattr(FlatDecoder, "forward", scaled)
    monkeypatch.setattr(flat_decoder, "TOLERANCE", float("inf"))
    with pytest.raises(ModelUnsupported, match="differs from its own attention"):
        load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=16), Reporter(quiet=True))


def test_a_decoder_that_scales_its_embeddings_keeps_its_own_call() -> None:
    model = tiny()
    fuse(model)
    decoder = model.module.model
    plain = decoder.forward

    def scaled(input_ids: torch.Tensor, **keywords: Any) -> Any:
        return plain(**keywords | {"inputs_embeds": decoder.embed_tokens(input_ids) * 1.001})

    decoder.forward = scaled
    assert not flatten(model)
    assert decoder.forward is scaled


def test_a_layer_with_a_part_of_its_own_keeps_its_own_call() -> None:
    model = tiny()
    fuse(model)
    model.module.model.layers[1].extra_norm = torch.nn.Identity()
    assert not flatten(model)
    assert not is_flat(model.module)


def test_a_layer_that_was_not_fused_keeps_its_own_call() -> None:
    model = tiny()
    fuse(model)
    layer = model.module.model.layers[0]
    layer.input_layernorm = build_model().model.layers[0].input_layernorm
    assert not flatten(model)
