"""Models to measure: random weights of known shapes, made on the device, or a prepared model.

Owns: the shapes, and what is counted as a model's weights. Must not know: what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers

from services.common.config import cache_dir
from services.engine.compiled import compile_blocks
from services.engine.models import CausalModel, load_model, probe_model
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.prepare import resolve_model
from services.engine.progress import Reporter
from services.engine.runners import Runner, make_runner

BLOCK_SIZE = 16
GIB = 1 << 30

_LLAMA_3 = {
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
_TINY = {"vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SHAPES = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, **_LLAMA_3},
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
        **_LLAMA_3,
    },
    "tiny-target": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **_TINY},
    "tiny-draft": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, **_TINY},
}
"""Of Llama 3.1 8B and Llama 3.2 1B, and two that a test can run. Any other name is a model to load."""


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model, its runner and the bytes that a step of one row cannot but read."""

    name: str
    model: CausalModel
    runner: Runner
    weight_bytes: int


def build(
    name: str, dtype: torch.dtype, device: torch.device, num_blocks: int, max_graph_tokens: int, compiled: bool
) -> BenchModel:
    """Makes or loads the model and records its graphs. Raises ConfigError or ModelUnsupported."""
    reporter = Reporter()
    if name in SHAPES:
        model = _random_model(name, dtype, device, reporter)
    else:
        model = load_model(resolve_model(name, cache_dir(), reporter), dtype, device, reporter)
    if compiled:
        compile_blocks(model.module)
    runner = make_runner(model, num_blocks, BLOCK_SIZE, max_graph_tokens, reporter)
    return BenchModel(name, model, runner, weight_bytes(model.module))


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters but an input embedding of its own, of which a step reads a few lines."""
    embedding, head = module.get_input_embeddings().weight, module.get_output_embeddings().weight
    total = sum(parameter.nbytes for parameter in module.parameters())
    return total if embedding is head else total - embedding.nbytes


def _random_model(name: str, dtype: torch.dtype, device: torch.device, reporter: Reporter) -> CausalModel:
    register()
    config = transformers.LlamaConfig(**SHAPES[name], bos_token_id=None, eos_token_id=None)
    with reporter.task(f"Making {name}"), torch.device(device):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    module.config.pad_token_id = None
    return probe_model(module.eval(), dtype, device)
