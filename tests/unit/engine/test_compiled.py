"""What is compiled of a model: what stands between attention and attention, and nothing else."""

from __future__ import annotations

import pytest
import torch

from services.engine.compiled import compile_blocks
from services.engine.models import probe_model
from services.engine.paged_attention import IMPLEMENTATION, register
from services.engine.self_check import self_check
from tests.tiny_models import SUPPORTED_FAMILIES, build_model


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_norms_and_mlps_of_every_layer_are_compiled_and_attention_is_not(family: str) -> None:
    module, compiled = build_model(family, vocab_size=64, num_layers=3), []
    num_compiled = compile_blocks(module, compiled.append)
    assert num_compiled == len(compiled) == len(set(map(id, compiled)))
    assert num_compiled % 3 == 0
    assert num_compiled > 0
    assert not any(hasattr(part, "layer_idx") for child in compiled for part in child.modules())
    compiled_parts = {id(part) for child in compiled for part in child.modules()}
    assert all(id(part) in compiled_parts for name, part in module.named_modules() if name.endswith(".mlp"))


def test_a_compiled_model_passes_the_check_at_load_with_one_compilation_a_kind() -> None:
    torch.set_num_threads(1)
    torch.compiler.reset()
    register()
    module, graphs = build_model("llama", vocab_size=64, num_layers=4), []

    def traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    module.set_attn_implementation(IMPLEMENTATION)
    module.config.pad_token_id = None
    num_compiled = compile_blocks(module, lambda child: child.compile(dynamic=True, backend=traced))
    assert num_compiled == 12
    assert self_check(probe_model(module, torch.float32, torch.device("cpu")), block_size=16) < 1e-5
    assert len(graphs) <= 6
