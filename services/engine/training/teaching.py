"""The second stage: a student learns from the self-play, then becomes a directory that a draft worker serves.

Owns: joining student, corpus, trainer, checkpoint, export and report. Must not know: how each of them works.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from services.common.config import cache_dir
from services.common.errors import ConfigError
from services.engine import digest
from services.engine.models import load_config, torch_device, torch_dtype
from services.engine.mtp_draft import MtpOptions, load_mtp
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.prepare import SAMPLE_DRAFTS, sample_draft_directory
from services.engine.progress import Reporter
from services.engine.runners import Runner
from services.engine.sampler import Sampler
from services.engine.trained_draft import EARLY_EXIT, FEATURES, MTP, Ends, Manifest, read_ends
from services.engine.training import checkpoint, report
from services.engine.training.checkpoint import Progress
from services.engine.training.config import DEFAULT_HEAD_TOKENS, TrainingConfig
from services.engine.training.corpus import Corpus, head_tokens
from services.engine.training.costs import Costs, measure_costs
from services.engine.training.display import progress as show_progress
from services.engine.training.feature_student import FeatureStudent, LoadedTarget
from services.engine.training.mtp_student import MtpStudent
from services.engine.training.shards import ShardStore
from services.engine.training.stop import Stop
from services.engine.training.student import Student, continue_from, read_draft, start_from, student_config
from services.engine.training.trainer import Recipe, Trainer
from services.engine.training.writing import dtype_of

_SETTINGS = (
    "kind",
    "layers",
    "width",
    "head_tokens",
    "loss",
    "heads",
    "seed",
    "batch_tokens",
    "learning_rate",
    "train_tokens",
    "unroll",
)
"""What may not change between the parts of a run; the last ones may, and then change its course."""
_FIXED = _SETTINGS[:6]


class Lesson(NamedTuple):
    """A trainer and where its checkpoint lies."""

    trainer: Trainer
    path: Path
    corpus: Corpus


class Teaching:
    """Of one target directory, with the self-play in `store`."""

    def __init__(self, config: TrainingConfig, target: Path, store: ShardStore, reporter: Reporter) -> None:
        if config.kind == MTP:
            config = replace(config, num_draft_tokens=min(config.num_draft_tokens, config.heads))
        self._config, self._target, self._store, self._reporter = config, target, store, reporter
        self._out = Path(config.out)
        self._device = torch_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)

    def prepare(self, always: frozenset[int]) -> Lesson:
        """A trainer at the start, or where its checkpoint is. `always`: tokens that every output vocabulary has."""
        path = self._out / "checkpoint.safetensors"
        corpus = self.open_corpus(None)
        ends = read_ends(self._target)
        vocab_size = len(ends.embedding)
        resumes, start = path.exists(), self._start(ends)
        if resumes:
            done, head_ids = checkpoint.read_progress(path)
            self._check_settings(done)
        else:
            done = Progress({name: getattr(self._config, name) for name in _SETTINGS})
            keeps = bool(start) and not self._config.head_tokens
            head_ids = start["head_ids"].long() if keeps else self._head_ids(corpus, vocab_size, always)
        layers, width = self._config.layer_indices, self._config.width
        torch.manual_seed(self._config.seed)
        student = self._student(student_config(load_config(self._target), layers, width), ends, head_ids)
        is_new = not resumes or self._config.kind == EARLY_EXIT  # whose layers no checkpoint holds
        if is_new and self._config.kind != MTP:
            start_from(student, self._target, layers, width)
        if start and not resumes:
            continue_from(student, start)
        trainer = Trainer(student, self._recipe(), self._device, vocab_size, done)
        if resumes:
            trainer.load(path)
        return Lesson(trainer, path, corpus)

    def _head_ids(self, corpus: Corpus, vocab_size: int, always: frozenset[int]) -> torch.Tensor:
        num = min(self._config.head_tokens or DEFAULT_HEAD_TOKENS, vocab_size)
        return torch.from_numpy(head_tokens(corpus.token_mass(vocab_size), num, always))

    def _start(self, ends: Ends) -> dict[str, torch.Tensor]:
        """Weights of the draft to start from, if there is one."""
        start = self._config.start
        directory = sample_draft_directory(start) if start in SAMPLE_DRAFTS else Path(start)
        return read_draft(directory, ends.digest) if start else {}

    def _student(self, config: Any, ends: Ends, head_ids: torch.Tensor) -> Student:
        kind = self._config.kind
        if kind not in (FEATURES, MTP):
            return Student(config, ends, head_ids, kind)
        target = LoadedTarget(self._target, torch_dtype(dtype_of(self._config)))
        if kind == MTP:
            return MtpStudent(config, ends, head_ids, target, self._config.heads)
        return FeatureStudent(config, ends, head_ids, target)

    def train(self, lesson: Lesson, stop: Stop) -> bool:
        """Trains until all tokens are done or `stop`, saving from time to time; returns whether all are done."""
        trainer, total = lesson.trainer, self._config.train_tokens
        saved = time.monotonic()
        with show_progress("Training", total, trainer.progress.num_tokens) as show:

            def after_step(trainer: Trainer) -> None:
                nonlocal saved
                show(trainer.progress.num_tokens, _remark(trainer.progress))
                if time.monotonic() - saved >= self._config.checkpoint_minutes * 60:
                    trainer.save(lesson.path)
                    saved = time.monotonic()

            trainer.run(self.open_corpus, lambda: stop.wanted, after_step)
        trainer.save(lesson.path)
        return trainer.progress.num_tokens >= total

    def export(self, lesson: Lesson) -> dict[str, object]:
        """Writes the draft, evaluates it, measures its cost and writes the report; returns its content."""
        trainer, student = lesson.trainer, lesson.trainer.student
        manifest = Manifest(
            target=self._config.target,
            embedding_digest=read_ends(self._target).digest,
            vocab_digest=digest.directory_vocab_digest(self._target),
            vocab_size=len(student.embedding),
            kind=self._config.kind,
            layers=() if self._config.kind == MTP else self._config.layer_indices,
        )
        student.export(self._out, manifest, torch.bfloat16)
        figures = trainer.figures(lesson.corpus)
        size = sum(parameter.numel() for parameter in student.trained().values())
        content = report.write_report(
            self._out, self._config, trainer.progress, figures, self._costs(), lesson.corpus.num_tokens, size
        )
        if trainer.progress.curve and report.can_plot():
            report.plot_curve(trainer.progress, self._out / "curve.png")
        elif not report.can_plot():
            self._reporter.note("No curve.png: matplotlib is not installed (pip install 'outrider[bench]')")
        return content

    def open_corpus(self, names: Sequence[str] | None) -> Corpus:
        """The shards of those names; None: all that there are."""
        infos = {info.path.name: info.path for info in self._store.infos()}
        if names is None:
            return Corpus(list(infos.values()))
        if missing := [name for name in names if name not in infos]:
            raise ConfigError(f"self_play: {', '.join(missing)}, which the checkpoint is in the middle of, is missing")
        return Corpus([infos[name] for name in names])

    def _recipe(self) -> Recipe:
        config = self._config
        return Recipe(
            loss=config.loss,
            learning_rate=config.learning_rate,
            train_tokens=config.train_tokens,
            batch_tokens=config.batch_tokens or (2048 if config.device.startswith("cuda") else 512),
            seed=config.seed,
            num_draft_tokens=config.num_draft_tokens,
            unroll=config.heads if config.kind == MTP else config.unroll,
            autocast=dtype_of(config) == "bfloat16",
        )

    def _check_settings(self, done: Progress) -> None:
        for name in _FIXED:
            if (now := getattr(self._config, name)) != (then := done.settings.get(name, now)):
                raise ConfigError(f"{name}: the checkpoint in {self._out} was begun with {then!r}, not {now!r}")

    def _costs(self) -> Costs:
        config = self._config
        dtype, quiet = dtype_of(config), Reporter(quiet=True)

        def runner(model: Path) -> Runner:
            options = EngineOptions(str(model), cache_dir(), dtype=dtype, device=config.device, num_blocks=32)
            return load_engine(options, quiet).runner

        target = runner(self._target)
        if config.kind != MTP:
            return measure_costs(target, runner(self._out), config.num_draft_tokens)
        options = MtpOptions(str(self._out), cache_dir(), str(self._target), dtype=dtype, device=config.device)
        return measure_costs(target, load_mtp(options, Sampler(), quiet), config.num_draft_tokens)


def _remark(done: Progress) -> str:
    remark = f"loss {done.last_loss:.3f}"
    if done.curve:
        remark += f", greedy acceptance {done.curve[-1]['greedy_acceptance']:.3f}"
        remark += f", {done.curve[-1]['mean_acceptance_len']:.2f} tokens a step"
    return remark
