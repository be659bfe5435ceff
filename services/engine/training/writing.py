"""The first stage: the target writes self-play into shards until there is enough of it.

Owns: joining the engine, the conversations and the files, and going on where an earlier run stopped. Must not know: how
a conversation is planned, what the data are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from services.engine.block_manager import BlockManager
from services.engine.models import load_config, torch_device
from services.engine.packed_linear import PackedLinear, packed_layer
from services.engine.paged_model import EngineOptions, PagedEngine, load_engine
from services.engine.progress import Reporter
from services.engine.trained_draft import FEATURES, MTP
from services.engine.training.chat_frame import ChatFrame, chat_frame, load_tokenizer
from services.engine.training.config import TrainingConfig
from services.engine.training.conversation import Conversation, Lengths, Library
from services.engine.training.display import progress
from services.engine.training.self_play import SelfPlay
from services.engine.training.shards import ShardStore, Transcript
from services.engine.training.stop import Stop

BLOCK_SIZE = 16
STEP_SEQUENCES = 48
"""Conversations of a forward on CPU."""


class Written(NamedTuple):
    """What lies in the store now, and whether it is all that was asked for."""

    num_tokens: int
    complete: bool


def load_writer(config: TrainingConfig, directory: Path, cache_dir: Path, reporter: Reporter) -> PagedEngine:
    """The target, with a pool for `num_sequences` conversations of full length."""
    num_sequences = sequences_of(config)
    return load_engine(
        EngineOptions(
            model=str(directory),
            cache_dir=cache_dir,
            dtype=dtype_of(config),
            device=config.device,
            num_blocks=num_sequences * -(-(config.max_conversation_len + 1) // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            num_threads=config.threads,
            max_sequences=num_sequences,
        ),
        reporter,
    )


def eos_ids(directory: Path) -> frozenset[int]:
    """The target's ends of sequence, without loading it."""
    try:
        ids = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    except OSError:
        ids = None
    ids = load_config(directory).get_text_config().eos_token_id if ids is None else ids
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def dtype_of(config: TrainingConfig) -> str:
    """The floating point type, by name."""
    if config.dtype != "auto":
        return config.dtype
    device = torch_device(config.device)
    computes = device.type == "cuda" or packed_layer(torch.bfloat16, device) is PackedLinear
    return "bfloat16" if computes else "float32"


def sequences_of(config: TrainingConfig) -> int:
    return config.num_sequences or (96 if config.device == "cpu" else 512)


def write_self_play(
    config: TrainingConfig, engine: PagedEngine, directory: Path, store: ShardStore, stop: Stop
) -> Written:
    """Writes until the store has `self_play_tokens`, or `stop`; conversations cut short by that are stored too."""
    infos = store.infos()
    num_tokens = sum(info.num_tokens for info in infos)
    tokenizer = load_tokenizer(directory)
    play = SelfPlay(
        engine.runner,
        BlockManager(engine.num_blocks, engine.block_size),
        _starter(config, tokenizer, chat_frame(tokenizer, engine.eos_token_ids)),
        num_sequences=sequences_of(config),
        step_sequences=STEP_SEQUENCES if config.device == "cpu" else sequences_of(config),
        first_number=max((info.next_number for info in infos), default=0),
        keep_features=config.keep_features and config.kind in (FEATURES, MTP),
    )
    waiting: list[Transcript] = []
    with progress("Self-play", config.self_play_tokens, num_tokens) as show:
        while num_tokens + _num_tokens(waiting) < config.self_play_tokens and not stop.wanted:
            waiting += play.step()
            if _num_tokens(waiting) >= config.shard_tokens:
                num_tokens += store.write(waiting, play.next_number).num_tokens
                waiting = []
            show(num_tokens + _num_tokens(waiting), f"{play.next_number:,} conversations")
    waiting = list(itertools.chain(waiting, play.stop()))
    if waiting:
        num_tokens += store.write(waiting, play.next_number).num_tokens
    return Written(num_tokens, num_tokens >= config.self_play_tokens)


def _num_tokens(transcripts: list[Transcript]) -> int:
    return sum(len(transcript.tokens) for transcript in transcripts)


def _starter(config: TrainingConfig, tokenizer: Any, frame: ChatFrame) -> partial[Conversation]:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def decode(token_ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

    return partial(
        Conversation,
        seed=config.seed,
        frame=frame,
        lengths=Lengths(max_conversation=config.max_conversation_len),
        encode=encode,
        decode=decode,
        library=Library(),
    )
