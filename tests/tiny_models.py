"""Tiny random causal language models with a tokenizer, as Hugging Face directories, for tests of the whole stack.

Owns: which families there are, how small they are, and that equal arguments give equal weights. Must not know: the
services. Weights are drawn so that logits depend on the whole context (the usual initialisation gives nearly uniform
ones) and have a standard deviation of about `peakedness`.
"""

from __future__ import annotations

import itertools
import string
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SUPPORTED_FAMILIES = ("llama", "qwen2", "gpt2", "opt", "qwen3", "mistral", "gemma2", "gemma3", "gpt_neox", "phi3")
"""Families that the engine runs. `bloom` can be built too: its attention never calls the interface."""

HIDDEN_SIZE = 32
EOS_TOKEN_ID = 0
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_config(
    family: str,
    *,
    vocab_size: int = 320,
    num_layers: int = 2,
    max_len: int = 512,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    sliding_window: int | None = None,
) -> transformers.PreTrainedConfig:
    """The configuration of a tiny model of `family`. `sliding_window` concerns Mistral, Gemma and Phi-3 only."""
    ids = {"bos_token_id": EOS_TOKEN_ID, "eos_token_id": EOS_TOKEN_ID, "pad_token_id": EOS_TOKEN_ID}
    common = {"vocab_size": vocab_size, "tie_word_embeddings": False, **ids}
    modern = {
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": max_len,
        **common,
    }
    head_dim = {"head_dim": HIDDEN_SIZE // num_heads}
    window = {"sliding_window": sliding_window}
    match family:
        case "llama":
            return transformers.LlamaConfig(**modern)
        case "qwen2":
            return transformers.Qwen2Config(**modern)
        case "qwen3":
            return transformers.Qwen3Config(**modern, **head_dim)
        case "mistral":
            return transformers.MistralConfig(**modern, **head_dim, **window)
        case "phi3":
            return transformers.Phi3Config(**modern, **window)
        case "gemma2":
            scale = HIDDEN_SIZE // num_heads
            return transformers.Gemma2Config(
                **modern, **head_dim, sliding_window=sliding_window or 16, query_pre_attn_scalar=scale
            )
        case "gemma3":
            scale = HIDDEN_SIZE // num_heads
            return transformers.Gemma3TextConfig(
                **modern,
                **head_dim,
                sliding_window=sliding_window or 16,
                query_pre_attn_scalar=scale,
                layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(num_layers)],
            )
        case "gpt_neox":
            del modern["num_key_value_heads"]
            return transformers.GPTNeoXConfig(**modern)
        case "gpt2":
            return transformers.GPT2Config(
                n_embd=HIDDEN_SIZE, n_layer=num_layers, n_head=num_heads, n_positions=max_len, **common
            )
        case "opt":
            return transformers.OPTConfig(
                hidden_size=HIDDEN_SIZE,
                word_embed_proj_dim=HIDDEN_SIZE,
                ffn_dim=2 * HIDDEN_SIZE,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                max_position_embeddings=max_len,
                **common,
            )
        case "bloom":
            return transformers.BloomConfig(hidden_size=HIDDEN_SIZE, n_layer=num_layers, n_head=num_heads, **common)
    raise ValueError(f"no tiny model of family {family!r}")


def build_model(
    family: str = "llama",
    *,
    vocab_size: int = 320,
    seed: int = 0,
    peakedness: float = 3.0,
    num_layers: int = 2,
    max_len: int = 512,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    sliding_window: int | None = None,
) -> transformers.PreTrainedModel:
    """A tiny random model in float32 on the CPU, in evaluation mode. The global random state is left as it was."""
    config = tiny_config(
        family,
        vocab_size=vocab_size,
        num_layers=num_layers,
        max_len=max_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        sliding_window=sliding_window,
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                continue
            embedding = parameter.shape[0] >= max(vocab_size, max_len) and parameter is not head
            std = 1.0 if embedding else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, peakedness * std if parameter is head else std, generator=generator)
    return model.eval()


def build_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, id 0 being `<eos>`.

    From 258 on byte-level BPE: any text is encoded, and pairs of letters are merged as far as the vocabulary reaches.
    Below, one token a character: id 1 is `<unk>`, then the first letters of the alphabet.
    """
    if vocab_size < 258:
        letters = (string.ascii_letters + string.digits + string.punctuation + " \n")[: vocab_size - 2]
        extra = [f"<extra_{i}>" for i in range(vocab_size - 2 - len(letters))]
        vocab = {token: i for i, token in enumerate(["<eos>", "<unk>", *letters, *extra])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = itertools.product(string.ascii_lowercase + "ĠTAIS", string.ascii_lowercase)
        merges = list(itertools.islice(pairs, vocab_size - 257))
        extra = [f"<extra_{i}>" for i in range(vocab_size - 257 - len(merges))]
        tokens = ["<eos>", *alphabet, *("".join(pair) for pair in merges), *extra]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def save_model(
    path: Path,
    family: str = "llama",
    *,
    vocab_size: int = 320,
    seed: int = 0,
    peakedness: float = 3.0,
    num_layers: int = 2,
    max_len: int = 512,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    sliding_window: int | None = None,
) -> Path:
    """Writes a directory that `AutoModelForCausalLM`, `AutoTokenizer` and the engine load; returns `path`."""
    model = build_model(
        family,
        vocab_size=vocab_size,
        seed=seed,
        peakedness=peakedness,
        num_layers=num_layers,
        max_len=max_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        sliding_window=sliding_window,
    )
    model.save_pretrained(path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(vocab_size),
        eos_token="<eos>",  # noqa: S106
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(path)
    return path
