"""The stages of a training run, in their order.

Owns: which follow each other and where their files lie. Must not know: how a stage works.

    OUT/self-play/shard-*.safetensors    what the target wrote          OUT/checkpoint.safetensors   the run
    OUT/config.json, model.safetensors   the draft                      OUT/report.json, curve.png   its figures
"""

from __future__ import annotations

from pathlib import Path

from services.common.config import cache_dir
from services.engine import digest
from services.engine.prepare import resolve_model
from services.engine.progress import Reporter
from services.engine.training.chat_frame import chat_frame, load_tokenizer
from services.engine.training.config import TrainingConfig
from services.engine.training.shards import ShardStore
from services.engine.training.stop import Stop
from services.engine.training.teaching import Teaching
from services.engine.training.writing import eos_ids, load_writer, write_self_play


def run(config: TrainingConfig, reporter: Reporter | None = None, stop: Stop | None = None) -> bool:
    """Does what is left to do; returns whether all is done. Run again with the same settings, it goes on.

    Raises ConfigError for a setting, ModelUnsupported for a target that no draft can be trained for.
    """
    reporter = reporter or Reporter()
    if stop is None:
        stop = Stop(config.max_minutes)
        stop.listen()
    directory = resolve_model(config.target, cache_dir(), reporter)
    shards = Path(config.self_play) if config.self_play else Path(config.out) / "self-play"
    store = ShardStore(shards, digest.model_digest(directory))
    if config.stage in ("all", "self-play") and not _write(config, directory, store, stop, reporter):
        return False
    if config.stage == "self-play":
        return True
    return _teach(config, directory, store, stop, reporter)


def _write(config: TrainingConfig, directory: Path, store: ShardStore, stop: Stop, reporter: Reporter) -> bool:
    num_tokens = sum(info.num_tokens for info in store.infos())
    if num_tokens >= config.self_play_tokens:
        return True
    engine = load_writer(config, directory, cache_dir(), reporter)
    written = write_self_play(config, engine, directory, store, stop)
    reporter.note(f"{written.num_tokens:,} tokens of self-play so far; {config.self_play_tokens:,} are wanted")
    return written.complete


def _teach(config: TrainingConfig, directory: Path, store: ShardStore, stop: Stop, reporter: Reporter) -> bool:
    teaching = Teaching(config, directory, store, reporter)
    frame = chat_frame(load_tokenizer(directory), eos_ids(directory))
    lesson = teaching.prepare(frame.stop_ids)
    complete = config.stage == "evaluate" or teaching.train(lesson, stop)
    content = teaching.export(lesson)
    held_out = content["held_out"]
    reporter.note(f"Draft in {config.out}: {held_out}; expected speed-up {content['expected_speed_up']}")
    return complete
