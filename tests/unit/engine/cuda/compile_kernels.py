"""Compiles the kernels for devices that need not be there; prints what each takes, one JSON object a line.

A process of its own, since Triton decides at import whether it interprets: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from services.engine.cuda import kernels
from services.engine.cuda.attention import MIN_SPLIT_LEN, tile_config

ELEMENTS = {
    torch.bfloat16: ("bf16", tl.bfloat16),
    torch.float16: ("fp16", tl.float16),
    torch.float32: ("fp32", tl.float32),
}


class Case(NamedTuple):
    capability: int
    dtype: torch.dtype
    dim: int
    tile_rows: int
    fold: int
    window: int = 0
    softcap: bool = False
    split: bool = True


CASES = (
    Case(90, torch.bfloat16, 128, 2, 4),
    Case(90, torch.bfloat16, 128, 8, 4, window=500, softcap=True),
    Case(90, torch.bfloat16, 128, 32, 4, split=False),
    Case(90, torch.bfloat16, 256, 32, 8),
    Case(90, torch.float32, 256, 32, 4),
    Case(80, torch.float16, 80, 8, 1),
    Case(80, torch.bfloat16, 64, 32, 3),
    Case(80, torch.float32, 8, 2, 2),
)


def compile_attend(case: Case) -> dict[str, object]:
    """The attention kernel as launched by services.engine.cuda.attention."""
    element, dot = ELEMENTS[case.dtype]
    dim = max(16, triton.next_power_of_2(case.dim))
    config = tile_config(case.tile_rows, case.fold, dim, case.dtype.itemsize)
    constants = {
        "NUM_KV_HEADS": 8,
        "FOLD": case.fold,
        "FOLD_TILE": config.fold_tile,
        "KEY_DIM": case.dim,
        "VALUE_DIM": case.dim,
        "KEY_PAD": dim,
        "VALUE_PAD": dim,
        "BLOCK_SIZE": 16,
        "M": config.m,
        "N": config.n,
        "MIN_SPLIT_LEN": MIN_SPLIT_LEN,
        "WINDOW": case.window,
        "HAS_SOFTCAP": case.softcap,
        "SPLIT": case.split,
        "DOT": dot,
    }
    pointers = dict.fromkeys(("query", "keys", "values", "output"), f"*{element}")
    numbers = {"scale": "fp32", "softcap": "fp32", "query_token_stride": "i32", "query_head_stride": "i32"}
    others = {"tiles": "*i64", "tables": "*i64", "partials": "*fp32", "weights": "*fp32", "num_splits": "i32"}
    types = {**pointers, **numbers, **others, **dict.fromkeys(constants, "constexpr")}
    return _compile(kernels.attend_kernel, case.capability, types, constants, config.num_warps, config.num_stages)


def compile_join(capability: int) -> dict[str, object]:
    """The kernel that joins splits."""
    constants = {"NUM_HEADS": 32, "NUM_SPLITS": 32, "VALUE_DIM": 128, "VALUE_PAD": 128}
    types = {"partials": "*fp32", "weights": "*fp32", "output": "*bf16", **dict.fromkeys(constants, "constexpr")}
    return _compile(kernels.join_kernel, capability, types, constants, 4, 2)


def compile_write(capability: int) -> dict[str, object]:
    """The kernel that writes keys and values."""
    dims = {"KEY_DIM": 128, "VALUE_DIM": 128, "KEY_PAD": 128, "VALUE_PAD": 128}
    constants = {"NUM_HEADS": 3, "HEADS_PAD": 4, **dims}
    pointers = dict.fromkeys(("keys", "values", "new_keys", "new_values"), "*bf16")
    strides = {f"{part}_{kind}_stride": "i32" for part in ("key", "value") for kind in ("token", "head")}
    types = {**pointers, **strides, "slots": "*i64", **dict.fromkeys(constants, "constexpr")}
    return _compile(kernels.write_kernel, capability, types, constants, 4, 2)


def _compile(
    kernel: triton.runtime.JITFunction,
    capability: int,
    types: dict[str, str],
    constants: dict[str, object],
    num_warps: int,
    num_stages: int,
) -> dict[str, object]:
    names = kernel.arg_names
    contents = [i for i, name in enumerate(names) if types[name].startswith("*") and types[name] != "*i64"]
    aligned = {(i,): [["tt.divisibility", 16]] for i in contents}
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {"shared": compiled.metadata.shared, "tensor_cores": "mma" in ptx, "asynchronous": "cp.async" in ptx}


def main() -> None:
    taken = [(str(case), compile_attend(case)) for case in CASES]
    for capability in (80, 90):
        taken.append((f"join {capability}", compile_join(capability)))
        taken.append((f"write {capability}", compile_write(capability)))
    sys.stdout.writelines(json.dumps(line) + "\n" for line in taken)


if __name__ == "__main__":
    main()
