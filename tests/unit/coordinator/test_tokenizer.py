from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from services.common.config import cache_dir
from services.common.errors import ConfigError, FailedPrecondition, InvalidArgument
from services.coordinator.chat_template import Message
from services.coordinator.tokenizer import DirectoryTokenizer, SimulatedTokenizer, load_tokenizer

TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('must not begin') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'skip' %}{% continue %}{% endif %}\n"
    "    {% generation %}{{ m.role }}:{{ m.content | tojson }}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A byte-level tokenizer with two special tokens, one of which begins every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    return tmp_path


def test_plain_text_begins_with_bos_only_where_nothing_precedes(directory: Path) -> None:
    tokenizer = DirectoryTokenizer(directory)
    first, later = tokenizer.encode("é", continues=False), tokenizer.encode("é", continues=True)
    assert first == [0, *later]
    assert len(later) == 2


def test_chat_goes_through_the_template(directory: Path) -> None:
    tokenizer = DirectoryTokenizer(directory)
    token_ids = tokenizer.encode_chat([Message("user", 'a"'), Message("user", "skip"), Message("user", "b")])
    text = tokenizer.text_stream(include_special_tokens=True, context=())
    assert "".join(text.push(i) for i in token_ids) == '<s>user:"a\\""user:"b">'


def test_a_refusal_by_the_template_names_the_field(directory: Path) -> None:
    with pytest.raises(InvalidArgument, match="must not begin") as caught:
        DirectoryTokenizer(directory).encode_chat([Message("assistant", "a")])
    assert caught.value.field == "chat.messages"


def test_a_template_cannot_reach_out_of_its_sandbox(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(InvalidArgument):
        DirectoryTokenizer(directory).encode_chat([Message("user", "a")])


def test_a_model_without_template_takes_plain_text_only(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FailedPrecondition) as caught:
        DirectoryTokenizer(directory).encode_chat([Message("user", "a")])
    assert caught.value.reason == "UNSUPPORTED"


def test_special_tokens_appear_only_on_request(directory: Path) -> None:
    tokenizer = DirectoryTokenizer(directory)
    token_ids = [*tokenizer.encode("a", continues=True), 1]
    shown = tokenizer.text_stream(include_special_tokens=True, context=())
    hidden = tokenizer.text_stream(include_special_tokens=False, context=())
    assert "".join(shown.push(i) for i in token_ids) == "a</s>"
    assert "".join(hidden.push(i) for i in token_ids) == "a"


def test_the_generation_configs_eos_list_comes_first(directory: Path) -> None:
    assert DirectoryTokenizer(directory).eos_token_ids == {1}
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert DirectoryTokenizer(directory).eos_token_ids == {0, 1}


def test_a_missing_directory_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_the_simulated_tokenizer_round_trips_any_text() -> None:
    tokenizer = SimulatedTokenizer()
    text = tokenizer.text_stream(include_special_tokens=False, context=())
    assert "".join(text.push(i) for i in [*tokenizer.encode("aé€", continues=False), 256]) == "aé€"


@pytest.mark.sample_model
def test_the_sample_models_chat_and_text_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    directories = sorted((cache_dir() / "models").glob("*smollm2*/tokenizer.json"))
    if not directories:
        pytest.skip("the sample target is not in the cache directory")
    directory = directories[0].parent
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer = DirectoryTokenizer(directory)
    chat = [{"role": "user", "content": "Grüße 🌍, how\nare   you?"}]
    expected = reference.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    token_ids = tokenizer.encode_chat([Message(m["role"], m["content"]) for m in chat])
    assert token_ids == list(expected)
    text = tokenizer.text_stream(include_special_tokens=False, context=())
    read = "".join(text.push(i) for i in token_ids) + text.flush()
    assert read == reference.decode(token_ids, skip_special_tokens=True)
    assert tokenizer.eos_token_ids == {reference.eos_token_id}
