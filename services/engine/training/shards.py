"""The files of self-play: tokens and, for each that was drawn, the head of the target's distribution there.

Owns: their format, which is safetensors, and that each file is there whole or not at all. Must not know: how the data
are made or used. For M drawn among N tokens of C conversations a shard holds

    tokens      int32 [N]            origins      uint8 [N] (conversation.Origin; 0: given, without a row)
    starts      int64 [C + 1]        row_ids      uint16 or int32 [M, L], most likely first
    row_starts  int64 [C + 1]        row_log_probs float16 [M, L]          tails float32 [M], mass beyond the L
    features    float16 [M, H], the target's final hidden states that the rows come from, where they are kept
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from services.common.errors import ConfigError
from services.engine.training.conversation import Origin

ROW_LEN = 64
_VERSION = "1"


class Rows(NamedTuple):
    """Distributions of the target: ids and log-probabilities of the most likely tokens, and the mass of all others."""

    token_ids: npt.NDArray[np.integer]
    log_probs: npt.NDArray[np.float16]
    tails: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Transcript:
    """A finished conversation. `rows` belong, in order, to the tokens that are not GIVEN."""

    tokens: npt.NDArray[np.int32]
    origins: npt.NDArray[np.uint8]
    rows: Rows
    features: npt.NDArray[np.float16] | None = None
    """The target's final hidden states [rows, H] that the rows come from; None: not kept."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the file's header tells."""

    path: Path
    source: str
    """Digest of the target that wrote it."""
    next_number: int
    """The first conversation that no shard so far holds."""
    num_tokens: int
    num_rows: int
    num_conversations: int


class ShardStore:
    """The shards of one directory. Files are named by their order."""

    def __init__(self, directory: Path, source: str) -> None:
        """`source`: digest of the target. Raises ConfigError where the directory holds the words of another."""
        self._directory, self._source = directory, source
        directory.mkdir(parents=True, exist_ok=True)
        for info in self.infos():
            if info.source != source:
                raise ConfigError(f"out: {info.path} was written by another target; choose another directory")

    def infos(self) -> list[ShardInfo]:
        return [read_info(path) for path in sorted(self._directory.glob("shard-*.safetensors"))]

    def write(self, transcripts: list[Transcript], next_number: int) -> ShardInfo:
        """Appends a shard; after a crash it is there whole or not at all. Either all have features or none is kept."""
        lens = [len(t.tokens) for t in transcripts]
        row_lens = [len(t.rows.tails) for t in transcripts]
        arrays = {
            "tokens": np.concatenate([t.tokens for t in transcripts]),
            "origins": np.concatenate([t.origins for t in transcripts]),
            "starts": np.cumsum([0, *lens], dtype=np.int64),
            "row_starts": np.cumsum([0, *row_lens], dtype=np.int64),
            "row_ids": _compact(np.concatenate([t.rows.token_ids for t in transcripts])),
            "row_log_probs": np.concatenate([t.rows.log_probs for t in transcripts]),
            "tails": np.concatenate([t.rows.tails for t in transcripts]),
        }
        features = [t.features for t in transcripts if t.features is not None]
        if len(features) == len(transcripts):
            arrays["features"] = np.concatenate(features)
        counts = {"num_tokens": sum(lens), "num_rows": sum(row_lens), "num_conversations": len(lens)}
        header = {"version": _VERSION, "source": self._source, "next_number": str(next_number)}
        existing = sorted(self._directory.glob("shard-*.safetensors"))
        number = int(existing[-1].stem.removeprefix("shard-")) + 1 if existing else 0
        path = self._directory / f"shard-{number:06d}.safetensors"
        write_atomically(path, lambda temporary: save_file(arrays, temporary, header | {"counts": json.dumps(counts)}))
        return read_info(path)


def _compact(ids: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    return ids.astype(np.uint16 if not ids.size or ids.max() < 1 << 16 else np.int32)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a path beside `path`, makes its content durable, and renames it."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_info(path: Path) -> ShardInfo:
    with safe_open(path, "numpy") as file:
        header = file.metadata() or {}
    if header.get("version") != _VERSION:
        raise ConfigError(f"out: {path} is no shard of this version of the program")
    return ShardInfo(path, header["source"], int(header["next_number"]), **json.loads(header["counts"]))


class ShardReader:
    """A shard of which conversations are read one at a time: a file is mapped, not loaded."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, "numpy")
        self._has_features = "features" in set(self._file.keys())  # type: ignore[no-untyped-call]
        self._starts = self._whole("starts")
        self._row_starts = self._whole("row_starts")

    @property
    def num_conversations(self) -> int:
        return len(self._starts) - 1

    def len_of(self, number: int) -> int:
        return int(self._starts[number + 1] - self._starts[number])

    def transcript(self, number: int) -> Transcript:
        tokens = slice(int(self._starts[number]), int(self._starts[number + 1]))
        rows = slice(int(self._row_starts[number]), int(self._row_starts[number + 1]))
        return Transcript(
            self._part("tokens", tokens),
            self._part("origins", tokens),
            Rows(self._part("row_ids", rows), self._part("row_log_probs", rows), self._part("tails", rows)),
            self._part("features", rows) if self._has_features else None,
        )

    def row_ids(self) -> npt.NDArray[np.integer]:
        return self._whole("row_ids")

    def row_log_probs(self) -> npt.NDArray[np.float16]:
        return self._whole("row_log_probs")

    def _whole(self, name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._file.get_tensor(name)
        return values

    def _part(self, name: str, part: slice) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._file.get_slice(name)[part]
        return values


def has_row(origins: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    flags: npt.NDArray[np.bool_] = origins != Origin.GIVEN
    return flags
