"""Digests name what a model computes and how it spells tokens, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.common.errors import ModelUnsupported
from services.engine import digest
from services.engine.digest import CACHE_FILE, directory_vocab_digest, model_digest
from tests.tiny_models import build_tokenizer, save_model


def test_equal_models_in_different_directories_have_one_digest(tmp_path: Path) -> None:
    first, second = (model_digest(save_model(tmp_path / name, "gpt2", seed=1)) for name in ("a", "b"))
    assert first == second


def test_another_seed_gives_another_digest(tmp_path: Path) -> None:
    assert model_digest(save_model(tmp_path / "a", seed=1)) != model_digest(save_model(tmp_path / "b", seed=2))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_every_file_that_matters_counts(tmp_path: Path, name: str) -> None:
    before = model_digest(save_model(tmp_path))
    (tmp_path / name).write_text((tmp_path / name).read_text() + " ")
    assert model_digest(tmp_path) != before


def test_other_files_do_not_count(tmp_path: Path) -> None:
    before = model_digest(save_model(tmp_path))
    (tmp_path / "README.md").write_text("about")
    assert model_digest(tmp_path) == before


def test_the_second_time_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model_digest(save_model(tmp_path))
    monkeypatch.setattr(digest.hashlib, "file_digest", lambda *_: pytest.fail("a file was read"))
    assert model_digest(tmp_path) == before


def test_a_broken_cache_is_ignored(tmp_path: Path) -> None:
    before = model_digest(save_model(tmp_path))
    for content in ("", "[]", "{}", '{"files": {}, "digest": "wrong"}'):
        (tmp_path / CACHE_FILE).write_text(content)
        assert model_digest(tmp_path) == before


def test_a_directory_that_cannot_be_written_still_has_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(digest.tempfile, "mkstemp", refuse)
    assert len(model_digest(tmp_path)) == 64
    assert not (tmp_path / CACHE_FILE).exists()


def test_vocabularies_differ_by_their_added_tokens_too(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    before = directory_vocab_digest(tmp_path)
    tokenizer.add_special_tokens(["<one more>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert directory_vocab_digest(tmp_path) != before


def test_an_unreadable_tokenizer_is_refused(tmp_path: Path) -> None:
    os.truncate(save_model(tmp_path) / "tokenizer.json", 10)
    with pytest.raises(ModelUnsupported, match="cannot be read"):
        directory_vocab_digest(tmp_path)
