"""Weight-only int8 for drafts: linear layers keep rounded weights and compute in bfloat16.

Owns: the way to the library that does it (torchao, an optional dependency). Must not know: models, draft and target.
Symmetric, one scale an output channel, as in LLM.int8() (Dettmers et al. 2022, section 2) without its outliers. It
changes the model: a draft loses acceptance, a target would lose its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from services.common.errors import ConfigError, ModelUnsupported

INT8 = "int8"
COMPUTE_DTYPE = torch.bfloat16


def check_available() -> None:
    """Raises ConfigError where the library is not installed."""
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ConfigError("dtype: int8 needs the package torchao: pip install 'outrider[int8]'") from error


def quantise(module: Any) -> None:
    """Rounds the weights of all linear layers in place. Raises ModelUnsupported where the head is the only one."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = module.get_output_embeddings()
    if not any(isinstance(part, torch.nn.Linear) and part is not head for part in module.modules()):
        raise ModelUnsupported(f"dtype: {type(module).__name__} has no linear layers that int8 could quantise")
    quantize_(module, Int8WeightOnlyConfig())
