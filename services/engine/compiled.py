"""Fusing what stands between the attention and the large products of a model, by torch.compile.

Owns: which modules are compiled. Must not know: families of models, graphs, steps.

Compiled are the children of each decoder layer that are no attention: norms and MLPs. Equal modules of all layers share
one compilation, since parameters are its inputs, and the number of tokens is dynamic. The attention, its rotary
embedding included, and the residual additions stay as they are: a layer's own call passes the step's objects through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compile_blocks(module: torch.nn.Module, compile_one: Callable[[Any], None] | None = None) -> int:
    """Compiles in place, lazily, and returns how many modules. Weights, names and results (up to rounding) stay."""
    compile_one = compile_one or _compile
    num_compiled = 0
    for layers in module.modules():
        if not isinstance(layers, torch.nn.ModuleList):
            continue
        for layer in layers:
            children = list(layer.children())
            if not any(_attends(child) for child in children):
                continue
            for child in children:
                if not _attends(child):
                    compile_one(child)
                    num_compiled += 1
    return num_compiled


def _attends(module: torch.nn.Module) -> bool:
    """Whether it is an attention: those know their layer's index, as the paged attention demands."""
    return any(hasattr(part, "layer_idx") for part in module.modules())


def _compile(module: torch.nn.Module) -> None:
    module.compile(dynamic=True)
