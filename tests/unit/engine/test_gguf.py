"""A GGUF file becomes a directory that computes and spells as the model it was made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from services.common.errors import ModelUnsupported
from services.engine.gguf import convert_gguf
from services.engine.models import load_model
from services.engine.progress import Reporter
from tests.tiny_models import CHAT_TEMPLATE, HIDDEN_SIZE, build_model, build_tokenizer

NUM_HEADS, NUM_KV_HEADS, VOCAB_SIZE = 4, 2, 300
QUIET = Reporter(quiet=True)
LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in fixed:
        return fixed[stem] + ".weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_TENSORS[rest]}.weight"


def interleaved(name: str, weight: np.ndarray) -> np.ndarray:
    """GGUF keeps the two halves of a rotary head interleaved, transformers one after the other."""
    heads = {"self_attn.q_proj": NUM_HEADS, "self_attn.k_proj": NUM_KV_HEADS}
    for part, num_heads in heads.items():
        if part in name:
            halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
    return weight


def round_to_q8(model: transformers.PreTrainedModel) -> None:
    """Rounds the projections to what Q8_0 can hold, so that writing them loses nothing more."""
    for name, parameter in model.named_parameters():
        if "proj" in name:
            quantised = gguf.quants.quantize(parameter.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
            rounded = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
            parameter.data.copy_(torch.from_numpy(rounded))


def write_gguf(path: Path, model: transformers.PreTrainedModel) -> Path:
    """A llama GGUF of `model` with the tiny tokenizer, its layer weights in Q8_0 as a quantised file has them."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCAB_SIZE)
    add_tokenizer(writer)
    for name, tensor in model.state_dict().items():
        weight = interleaved(name, tensor.numpy())
        if "proj" in name:
            quantised = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocab = build_tokenizer(VOCAB_SIZE).get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(token) for token in tokens if len(token) == 2])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[transformers.PreTrainedModel, Path]:
    """A model and the directory its GGUF was converted to."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("gguf")
    model = build_model("llama", vocab_size=VOCAB_SIZE, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS)
    round_to_q8(model)
    source = write_gguf(folder / "tiny.gguf", model)
    return model, convert_gguf(source, folder / "converted", QUIET)


def test_the_converted_model_computes_what_the_quantised_weights_say(
    converted: tuple[transformers.PreTrainedModel, Path],
) -> None:
    model, directory = converted
    tokens = torch.arange(1, 40).unsqueeze(0)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-3, rtol=0)


def test_the_weights_are_stored_in_float32_and_no_longer_count_as_quantised(
    converted: tuple[transformers.PreTrainedModel, Path],
) -> None:
    _, directory = converted
    with safe_open(directory / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    assert "quantization_config" not in (directory / "config.json").read_text()


def test_the_engine_loads_the_directory_with_ends_of_sequence(
    converted: tuple[transformers.PreTrainedModel, Path],
) -> None:
    _, directory = converted
    model = load_model(directory, torch.float32, torch.device("cpu"), QUIET)
    assert model.eos_token_ids == frozenset({0})
    assert model.layer_shapes[0].key_dim == HIDDEN_SIZE // NUM_HEADS


def test_the_tokenizer_spells_as_before_and_keeps_the_chat_template(
    converted: tuple[transformers.PreTrainedModel, Path],
) -> None:
    _, directory = converted
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "the rabbit, 42 times: äß\n"
    assert tokenizer(text).input_ids == build_tokenizer(VOCAB_SIZE).encode(text).ids
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "user: hi\n"


@pytest.mark.parametrize("content", [b"GGUF" + bytes(100), b"GGUFxxxx", b""])
def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "broken.gguf"
    source.write_bytes(content)
    with pytest.raises(ModelUnsupported, match=r"broken\.gguf cannot be converted"):
        convert_gguf(source, tmp_path / "out", QUIET)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.gguf"]
