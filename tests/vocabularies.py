"""Small tokenizers of different kinds, trained on sentences that stand here, for tests of differing vocabularies.

Owns: the kinds and their texts. Must not know: models, the services' drafters. Equal arguments give equal tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from services.engine.vocabulary import Roles, Vocabulary
from tests.tiny_models import build_model

SENTENCES = {
    "sea": "The ships sail over the sea and the sailors sing. Naïve gulls cry: “land, land!” 12 of them, 345 feet high.",
    "code": "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 2))  # über 100 € – the sea\n",
}


def byte_level(corpus: str, vocab_size: int, special: Iterable[str] = ("<eos>",)) -> Tokenizer:
    """Byte-level BPE as GPT-2 and OPT have it; the special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCES[corpus]] * 3, trainer)
    return tokenizer


def byte_fallback(corpus: str, *, begins: bool = True) -> Tokenizer:
    """BPE over characters with bytes for the others, spaces as ▁, one put in front: as Llama 2 has it."""
    letters = sorted(set(SENTENCES[corpus].replace(" ", "▁")) | set("▁"))
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", letter) for letter in letters if letter.isascii() and letter.isalpha()] + [("t", "h"), ("th", "e")]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *letters, *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return tokenizer


def metaspace(corpus: str) -> Tokenizer:
    """The same kind with a pre-tokenizer that splits at spaces, as T5's family has it."""
    tokenizer = byte_fallback(corpus, begins=False)
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def characters(tokens: Iterable[str]) -> Tokenizer:
    """A token each as given, bytes written <0xNN>; text is split into characters, the first token stands for others."""
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=next(iter(vocab))))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def vocabulary(tokenizer: Tokenizer, bos: str = "", eos: str = "<eos>") -> Vocabulary:
    """With its roles by the contents of tokens."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return Vocabulary(tokenizer, Roles(*(frozenset({ids[t]}) if t in ids else frozenset() for t in (bos, eos))))


def with_markers(tokenizer: Tokenizer, *markers: str) -> Tokenizer:
    """Adds special tokens such as a chat template's."""
    tokenizer.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    return tokenizer


def save_pair_member(path: Path, family: str, tokenizer: Tokenizer, *, seed: int = 0, eos: str = "<eos>") -> Path:
    """A tiny random model of `family` with that tokenizer, as a directory that the services load."""
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    eos_id = tokenizer.token_to_id(eos)
    model = build_model(family, vocab_size=size, seed=seed)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = eos_id
    model.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(path)
    return path
