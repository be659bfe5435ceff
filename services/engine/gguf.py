"""Turns a GGUF file into a Hugging Face directory: float32 safetensors, config and tokenizer.

Owns: the conversion and its atomicity. Must not know: where the file came from.
Invariant: a directory that exists is complete; work in progress lies beside it under another name.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import core_model_loading, modeling_gguf_pytorch_utils

from services.common.errors import ModelUnsupported
from services.engine.loading_bars import loading_bars
from services.engine.progress import Advance, Reporter


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `target` and renames it to `target` once the block succeeded."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def convert_gguf(source: Path, target: Path, reporter: Reporter) -> Path:
    """Writes `target` from the GGUF file `source`, weights dequantised to float32; returns `target`.

    Raises ModelUnsupported with the reason where transformers cannot read the file.
    """
    with atomic_directory(target) as work:
        try:
            # What transformers draws on sys.stderr is not for people; the reporter already holds the real stream.
            with reporter.task(f"Converting {source.name}") as advance, contextlib.redirect_stderr(io.StringIO()):
                _convert(source, work, advance)
        except (ValueError, LookupError, NotImplementedError, RuntimeError, struct.error) as error:
            raise ModelUnsupported(f"{source.name} cannot be converted: {error}") from error
    return target


def _convert(source: Path, target: Path, advance: Advance) -> None:
    folder, name = str(source.parent), source.name
    with loading_bars(advance, {modeling_gguf_pytorch_utils: "de-quantising", core_model_loading: "loading"}):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # A model read from a GGUF counts as quantised and refuses to be saved; its weights in a fresh model do not.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    with torch.device("meta"):
        fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)
