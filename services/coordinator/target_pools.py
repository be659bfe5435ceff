"""Which targets serve a model together: those that compute the same.

Owns: what makes targets interchangeable, and which kind a name stands for. Must not know: links, sessions. Pure.

A model's pool is of one kind: the most frequent one of the targets that are up, or were so a moment ago, so that a
restart changes nothing. All coordinators see the same targets, and so choose the same kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from services.common.values import WorkerInfo

GRACE_S = 10.0
"""For so long a target that is not up counts."""


class TargetKind(NamedTuple):
    """What must be equal for a generation to move from one target to another."""

    digest: str
    vocab_digest: str
    dtype: str
    noise_version: int

    @classmethod
    def of(cls, info: WorkerInfo) -> TargetKind | None:
        """None for a target without a model."""
        model = info.model
        return cls(model.digest, model.vocab_digest, model.dtype, info.noise_version) if model else None

    @property
    def numerics(self) -> str:
        """What decides its tokens besides the digest, as the session's record holds it."""
        return f"{self.dtype} noise-{self.noise_version}"


class Member(NamedTuple):
    """A target that names the model. `down_s`: how long it has not been up; 0: it is."""

    kind: TargetKind
    down_s: float


def elect(present: TargetKind | None, members: Sequence[Member]) -> TargetKind | None:
    """The pool's kind from now on; the present one where no target counts. None only where there never was one."""
    counts = Counter(member.kind for member in members if member.down_s < GRACE_S)
    return max(counts, key=lambda kind: (counts[kind], kind), default=present)


def differences(kind: TargetKind, pool: TargetKind) -> str:
    """In words."""
    pairs = zip(TargetKind._fields, kind, pool, strict=True)
    return ", ".join(f"{name} {mine} instead of {its}" for name, mine, its in pairs if mine != its)
