"""Heads on features for tiny targets, without training: the target's own layers, stirred by its features.

Owns: making them. Must not know: the services. They agree with their target often, but not always, and what they draft
depends on the features that they are told.
"""

from __future__ import annotations

from pathlib import Path

import torch

from services.engine.digest import directory_vocab_digest
from services.engine.models import load_config
from services.engine.trained_draft import Manifest, read_ends
from services.engine.training.feature_student import FeatureStudent, LoadedTarget
from services.engine.training.student import start_from, student_config


def feature_student(target: Path, *, strength: float, seed: int = 3) -> FeatureStudent:
    """All of the target's layers and its whole vocabulary; `strength`: how much features count."""
    config, ends = load_config(target), read_ends(target)
    layers = tuple(range(config.get_text_config().num_hidden_layers))
    head_ids = torch.arange(len(ends.embedding))
    student = FeatureStudent(student_config(config, layers, 0), ends, head_ids, LoadedTarget(target, torch.float32))
    start_from(student, target, layers, 0)
    with torch.no_grad():
        student.feature_projection.normal_(0.0, strength, generator=torch.Generator().manual_seed(seed))
    return student.eval()


def export(student: FeatureStudent, target: Path, directory: Path) -> Path:
    """The student as the directory that a draft worker serves."""
    ends = read_ends(target)
    layers = tuple(range(student.config.get_text_config().num_hidden_layers))
    vocab_digest = directory_vocab_digest(target)
    manifest = Manifest(str(target), ends.digest, vocab_digest, len(ends.embedding), "features", layers)
    student.export(directory, manifest, torch.float32)
    return directory
