"""What is read off tokenizers, against what they decode and encode themselves."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models

from services.common.errors import ModelUnsupported
from services.engine.vocabulary import Vocabulary, load_vocabulary
from tests import vocabularies
from tests.tiny_models import save_model

TEXT = "the sailors sing über 12 € – “land”"
BUILD = {
    "byte_level": lambda: vocabularies.byte_level("sea", 320),
    "byte_fallback": lambda: vocabularies.byte_fallback("sea"),
    "metaspace": lambda: vocabularies.metaspace("sea"),
    "characters": lambda: vocabularies.characters(["?", *sorted(set(TEXT))]),
}


@pytest.mark.parametrize("kind", BUILD)
def test_bytes_of_tokens_join_to_the_text(kind: str) -> None:
    vocabulary = Vocabulary(BUILD[kind]())
    data = b"".join(vocabulary.bytes_of[i] for i in vocabulary.encode(TEXT))
    assert data.decode() == " " * vocabulary.strips_space + TEXT
    assert all(vocabulary.bytes_of[i] == data for data, i in vocabulary.id_of.items())


@pytest.mark.parametrize(
    ("kind", "splits"), [("byte_level", True), ("byte_fallback", False), ("metaspace", True), ("characters", True)]
)
def test_text_may_be_cut_at_spaces_unless_each_part_is_changed(kind: str, splits: bool) -> None:
    assert Vocabulary(BUILD[kind]()).splits_at_spaces is splits


def test_a_vocabulary_with_tokens_across_words_is_not_cut() -> None:
    tokens = ["?", *sorted(set("A1 Bc x  1a \nZ, y")), "of the"]
    assert not Vocabulary(vocabularies.characters(tokens)).splits_at_spaces


def test_special_tokens_have_no_text_and_what_begins_a_text_is_known() -> None:
    vocabulary = Vocabulary(BUILD["byte_fallback"]())
    assert vocabulary.special == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert not vocabulary.special.keys() & vocabulary.bytes_of.keys()
    assert vocabulary.prefix_ids == (1,)
    assert Vocabulary(BUILD["byte_level"]()).prefix_ids == ()


def test_longest_tokens_match_first_and_matching_ends_where_none_fits() -> None:
    vocabulary = Vocabulary(vocabularies.characters(["?", "a", "b", "ab", "abc"]))
    assert vocabulary.match(b"ababcbxa") == [3, 4, 2]
    assert vocabulary.match(b"") == []


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), None])
def test_tokens_without_a_text_of_their_own_are_refused(decoder: object) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))  # noqa: S106
    if decoder:
        tokenizer.decoder = decoder
    with pytest.raises(ModelUnsupported, match="tokens"):
        Vocabulary(tokenizer)


def test_a_directory_names_what_begins_and_ends_sequences(tmp_path) -> None:
    save_model(tmp_path)
    assert load_vocabulary(tmp_path).roles.eos == {0}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<eos>"}))
    assert load_vocabulary(tmp_path).roles.bos == {0}
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelUnsupported, match=r"tokenizer\.json cannot be read"):
        load_vocabulary(tmp_path)
