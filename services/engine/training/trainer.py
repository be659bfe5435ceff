"""Training: steps of AdamW over batches whose order is fixed, so that a run that was cut goes on as if it had not been.

Owns: the loop, the schedule of the learning rate and when to evaluate and to save. Must not know: files of self-play,
the form of a draft. On CPU in float32 an interrupted run gives the weights of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from services.engine.training import checkpoint
from services.engine.training.checkpoint import Progress
from services.engine.training.corpus import Batch, Corpus, collate
from services.engine.training.evaluation import Figures, evaluate
from services.engine.training.losses import LOSSES, lesson
from services.engine.training.student import Student

_WARMUP_SHARE = 0.02
_LAST_SHARE = 0.05
"""Of the highest learning rate, at the end."""
_EVALUATIONS = 40
_BETAS = (0.9, 0.98)
_MAX_NORM = 1.0
_PASS_WEIGHT = 0.8
"""What a pass counts for, of the one before: a token far into a draft is seldom reached."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train."""

    loss: str
    learning_rate: float
    train_tokens: int
    batch_tokens: int
    seed: int
    num_draft_tokens: int
    autocast: bool
    """Compute products in bfloat16."""
    unroll: int = 1
    """Passes of a step, for a student that has several."""
    max_held_out: int = 48
    """Conversations that an evaluation takes."""


class Trainer:
    """A student, its optimiser, and how far they are."""

    def __init__(
        self, student: Student, recipe: Recipe, device: torch.device, vocab_size: int, progress: Progress
    ) -> None:
        self.student = student.to(device).eval()  # no dropout
        self.progress = progress
        self._recipe, self._device = recipe, device
        self._trained = student.trained()
        matrices = [p for p in self._trained.values() if p.dim() >= 2]
        others = [p for p in self._trained.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=_BETAS)
        self.place_of = torch.full((vocab_size,), -1, dtype=torch.int64)
        self.place_of[student.head_ids.cpu()] = torch.arange(len(student.head_ids))
        self.place_of = self.place_of.to(device)

    def save(self, path: Path) -> None:
        checkpoint.save(path, self.progress, self.student.head_ids, self._trained, self._optimizer)

    def load(self, path: Path) -> None:
        checkpoint.load(path, self._trained, self._optimizer, self.progress.num_steps)

    def run(
        self,
        open_corpus: Callable[[list[str] | None], Corpus],
        stopped: Callable[[], bool],
        after_step: Callable[[Trainer], None],
    ) -> None:
        """Trains up to `train_tokens`, or until `stopped`. `open_corpus` opens the shards of those names, or all."""
        done = self.progress
        while done.num_tokens < self._recipe.train_tokens and not stopped():
            corpus = open_corpus(done.shards or None)
            done.shards = list(corpus.names)
            batches = corpus.batches(self._recipe.seed, done.epoch, self._recipe.batch_tokens)
            for numbers in batches[done.next_batch :]:
                self._timed_step(collate([corpus.transcript(int(n)) for n in numbers]).to(self._device))
                self._maybe_evaluate(corpus)
                after_step(self)
                if done.num_tokens >= self._recipe.train_tokens or stopped():
                    break
            else:
                done.epoch, done.next_batch, done.shards = done.epoch + 1, 0, []

    def figures(self, corpus: Corpus) -> Figures:
        """On the first conversations held out."""
        held_out = [corpus.transcript(int(n)) for n in corpus.held_out[: self._recipe.max_held_out]]
        return evaluate(self.student, held_out, self.place_of, self._recipe.num_draft_tokens, self._device)

    def _timed_step(self, batch: Batch) -> None:
        started = time.perf_counter()
        loss = self._step(batch)
        done = self.progress
        done.num_steps += 1
        done.next_batch += 1
        done.num_tokens += batch.num_tokens
        done.trained_s += time.perf_counter() - started
        done.last_loss += max(0.02, 1 / done.num_steps) * (loss - done.last_loss)

    def _step(self, batch: Batch) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * self._rate()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._recipe.autocast):
            passes = self.student.passes(batch, self._recipe.unroll, cut=True)
            logits = [self.student.logits(hidden[batch.sequences, batch.positions]) for hidden in passes]
        taught = lesson(batch.row_ids, batch.row_log_probs, batch.tails, self.place_of)
        weights = [_PASS_WEIGHT**i for i in range(len(passes))]
        losses = [LOSSES[self._recipe.loss](each, taught).mean() * w for each, w in zip(logits, weights, strict=True)]
        loss = torch.stack(losses).sum() / sum(weights)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(list(self._trained.values()), _MAX_NORM)
        self._optimizer.step()
        return float(loss.detach())

    def _rate(self) -> float:
        """Share of the highest learning rate: a rising line, then half a cosine down, over the tokens to train on."""
        share = self.progress.num_tokens / self._recipe.train_tokens
        if share < _WARMUP_SHARE:
            return (share + 1e-3) / (_WARMUP_SHARE + 1e-3)
        down = (share - _WARMUP_SHARE) / (1 - _WARMUP_SHARE)
        return _LAST_SHARE + (1 - _LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * min(down, 1.0)))

    def _maybe_evaluate(self, corpus: Corpus) -> None:
        done = self.progress
        num_due = min(_EVALUATIONS, done.num_tokens * _EVALUATIONS // self._recipe.train_tokens)
        if num_due > done.num_evaluations:
            done.num_evaluations = num_due
            self.record(self.figures(corpus))

    def record(self, figures: Figures) -> None:
        """Adds a point to the curve."""
        done = self.progress
        point = {"num_tokens": float(done.num_tokens), "trained_s": done.trained_s, "train_loss": done.last_loss}
        point |= {name: value for name, value in asdict(figures).items() if isinstance(value, float)}
        done.curve.append(point)
