"""A student that starts from a target, before it has learnt anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from services.common.errors import ModelUnsupported
from services.engine.models import load_config
from services.engine.trained_draft import Manifest, load_trained_draft, read_ends
from services.engine.training.student import Student, start_from, student_config
from tests.tiny_models import SUPPORTED_FAMILIES, save_model, tiny_config

LAYERS = (0, 1)


def started(target: Path) -> Student:
    """All of the target's layers and its whole vocabulary."""
    student = Student(student_config(load_config(target), LAYERS, 0), read_ends(target), torch.arange(300))
    start_from(student, target, LAYERS, 0)
    return student.eval()


@pytest.mark.parametrize("family", [name for name in SUPPORTED_FAMILIES if name != "gemma2"])
@torch.no_grad()
def test_a_student_of_all_layers_starts_as_its_target_and_is_served_so(family: str, tmp_path: Path) -> None:
    target = save_model(tmp_path / "target", family, vocab_size=300)
    whole = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = whole(input_ids=tokens).logits
    student = started(target)
    torch.testing.assert_close(student.logits(student(tokens)), expected, rtol=1e-4, atol=1e-4)
    manifest = Manifest(str(target), read_ends(target).digest, "", 300, layers=LAYERS)
    student.export(tmp_path / "draft", manifest, torch.float32)
    served = load_trained_draft(tmp_path / "draft", load_config(tmp_path / "draft"), target, torch.float32, "sdpa")
    torch.testing.assert_close(served(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [("gemma2", {}, "caps its logits"), ("llama", {"logits_scaling": 8.0}, r"scales its logits \(logits_scaling\)")],
)
def test_a_head_that_is_more_than_a_product_is_refused(family: str, changes: dict[str, float], message: str) -> None:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ModelUnsupported, match=message):
        student_config(config, (0,), 0)
