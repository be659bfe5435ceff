"""What is read off a model at load, and which models are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from services.common.errors import ConfigError, ModelUnsupported
from services.engine.kv_pool import LayerShape
from services.engine.models import CausalModel, load_model, probe_model, torch_device, torch_dtype
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.progress import Reporter
from tests.tiny_models import build_model, save_model, tiny_config

CPU = torch.device("cpu")
QUIET = Reporter(quiet=True)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def load(directory: Path) -> CausalModel:
    return load_model(directory, torch.float32, CPU, QUIET)


def probe(module: transformers.PreTrainedModel) -> CausalModel:
    register()
    module.set_attn_implementation(IMPLEMENTATION)
    return probe_model(module, torch.float32, CPU)


def test_a_saved_model_is_loaded_with_its_shapes_and_limits(tmp_path: Path) -> None:
    model = load(save_model(tmp_path, "qwen2", vocab_size=300, num_layers=3, max_len=77))
    assert model.layer_shapes == (LayerShape(num_kv_heads=2, key_dim=8, value_dim=8),) * 3
    assert (model.vocab_size, model.max_sequence_len, model.eos_token_ids) == (300, 77, frozenset({0}))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_model_is_loaded_in_the_type_asked_for(tmp_path: Path, name: str) -> None:
    model = load_model(save_model(tmp_path, "llama"), torch_dtype(name), CPU, QUIET)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch_dtype(name)}


def test_several_ends_of_sequence_come_from_the_generation_config(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "llama")
    transformers.GenerationConfig(eos_token_id=[3, 7]).save_pretrained(directory)
    assert load(directory).eos_token_ids == frozenset({3, 7})


def test_bloom_is_refused_since_its_attention_does_not_call_the_interface(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="BloomForCausalLM never calls transformers' attention interface"):
        load(save_model(tmp_path, "bloom"))


def test_layers_that_are_not_attention_are_refused(tmp_path: Path) -> None:
    config = tiny_config("qwen3")
    config.layer_types = ["full_attention", "chunked_attention"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelUnsupported, match="chunked_attention"):
        load(tmp_path)


def test_a_layer_that_skips_the_interface_is_refused() -> None:
    module = build_model("llama", num_layers=3)
    module.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ModelUnsupported, match=r"3 layers but called the attention interface for layers \[0, 2\]"):
        probe(module)


def test_a_window_other_than_the_configured_one_is_refused() -> None:
    module = build_model("mistral", sliding_window=8)
    module.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelUnsupported, match="window of 8 in layer 0 where its configuration says None"):
        probe(module)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotation_that_depends_on_the_batch_limits_the_length_to_where_it_does_not(kind: str) -> None:
    module = build_model("llama", max_len=512)
    module.config.rope_parameters |= {"rope_type": kind, "original_max_position_embeddings": 128}
    assert probe(module).max_sequence_len == 128


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelUnsupported, match="cannot be loaded"):
        load(tmp_path)


def test_code_from_a_repository_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ModelUnsupported, match="trust_remote_code"):
        load(tmp_path)


def test_unknown_types_and_devices_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="dtype: 'int8'"):
        torch_dtype("int8")
    with pytest.raises(ConfigError, match="device: 'meta'"):
        torch_device("meta")
    with pytest.raises(ConfigError, match="device: 'toaster'"):
        torch_device("toaster")
    with pytest.raises(ConfigError, match="device: 'cuda:99' is not there"):
        torch_device("cuda:99")
