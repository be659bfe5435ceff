"""Which targets serve a model together: those that compute the same.

Owns: what makes targets interchangeable, and which kind a name stands for. Must not know: links, sessions. Pure.

A model's pool is of one kind. Its kind stays while a target of it is up, or was so a moment ago: a target that comes
back must find its place. Else it becomes the most frequent kind that is up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from services.common.values import WorkerInfo

GRACE_S = 10.0
"""For so long a kind holds its pool without a target that is up."""


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
    """The pool's kind from now on. None only where there never was one."""
    if present and any(member.kind == present and member.down_s < GRACE_S for member in members):
        return present
    counts = Counter(member.kind for member in members if not member.down_s)
    return max(counts, key=lambda kind: (counts[kind], kind), default=present or _first(members))


def _first(members: Sequence[Member]) -> TargetKind | None:
    return min((member.kind for member in members), default=None)


def differences(kind: TargetKind, pool: TargetKind) -> str:
    """In words."""
    pairs = zip(TargetKind._fields, kind, pool, strict=True)
    return ", ".join(f"{name} {mine} instead of {its}" for name, mine, its in pairs if mine != its)
