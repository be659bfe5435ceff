"""Small tokenizers of different kinds, trained on sentences that stand here, for tests of differing vocabularies.

Owns: the kinds and their texts. Must not know: models, the services' drafters. Equal arguments give equal tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from services.engine.vocabulary import Roles, Vocabulary
from services.engine.vocabulary_pair import VocabularyPair
from tests.tiny_models import build_model

SENTENCES = {
    "sea": "The ships sail over the sea and the sailors sing. Naïve gulls cry: “land, land!” 12 of them, 345 feet up.",
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


def twin(model: transformers.PreTrainedModel, pair: VocabularyPair, size: int, seed: int = 9) -> Any:
    """The same model over a draft's vocabulary of `size` tokens: shared ones have the same rows, the others random."""
    family = {"llama": "llama", "gpt2": "gpt2"}[model.config.model_type]
    draft = build_model(family, vocab_size=size, seed=seed, peakedness=0.5)
    theirs, mine = model.state_dict(), draft.state_dict()
    rows = torch.tensor(list(pair.target_id_of.items()))
    for name, weight in theirs.items():
        if weight.shape == mine[name].shape:
            mine[name].copy_(weight)
        else:
            mine[name][rows[:, 0]] = weight[rows[:, 1]]
    return draft


def save_with(path: Path, model: transformers.PreTrainedModel, tokenizer: Tokenizer, eos: str) -> Path:
    """Model and tokenizer as a directory that the services load; returns it."""
    eos_id = tokenizer.token_to_id(eos)
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = eos_id
    model.save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(path)
    return path
