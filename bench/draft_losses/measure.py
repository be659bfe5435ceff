"""Trains one variant of a draft for a given time, from self-play that is there, and says how good it is.

Owns: one variant's run. Must not know: how variants are compared. Time is that of training steps on one thread; the
tokens that fit into it are estimated first, so that the learning rate comes down at its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from services.common.config import cache_dir
from services.engine.digest import directory_vocab_digest
from services.engine.models import load_config
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from services.engine.trained_draft import Manifest, read_ends
from services.engine.training.checkpoint import Progress
from services.engine.training.corpus import Corpus, head_tokens
from services.engine.training.costs import measure_costs
from services.engine.training.student import Student, start_from, student_config
from services.engine.training.trainer import Recipe, Trainer

HEAD_TOKENS, BATCH_TOKENS, LEARNING_RATE = 8192, 2048, 1e-3
NUM_DRAFT_TOKENS = 5
NUM_CURVE, NUM_HELD_OUT = 2, 32
"""Conversations that the curve and the end are evaluated on."""
TRIAL_STEPS = 3


@dataclass(frozen=True, slots=True)
class Variant:
    """`width` 0: the target's."""

    loss: str = "kl"
    layers: tuple[int, ...] = (0,)
    width: int = 0


VARIANTS = {
    "kl": Variant(),
    "tv": Variant(loss="tv"),
    "two layers": Variant(layers=(0, 29)),
    "narrower": Variant(width=320),
}


def measure(
    variant: Variant, target: Path, corpus: Corpus, seconds: float, out: Path, on_step: Callable[[float], None]
) -> dict[str, object]:
    """`out`: where the draft is written to be timed. `on_step` hears the share that is done."""
    torch.set_num_threads(1)
    trial = _trainer(variant, target, corpus, BATCH_TOKENS * (TRIAL_STEPS + 1))
    started = time.perf_counter()
    trial.run(lambda names: corpus, lambda: trial.progress.num_steps >= TRIAL_STEPS, lambda _: None)
    rate = trial.progress.num_tokens / (time.perf_counter() - started)
    total = max(BATCH_TOKENS, int(rate * seconds))
    trainer = _trainer(variant, target, corpus, total)
    trainer.run(lambda names: corpus, lambda: False, lambda t: on_step(min(1.0, t.progress.num_tokens / total)))
    return _figures(trainer, variant, target, corpus, out)


def _trainer(
    variant: Variant, target: Path, corpus: Corpus, train_tokens: int, max_held_out: int = NUM_CURVE
) -> Trainer:
    ends = read_ends(target)
    torch.manual_seed(0)
    ids = torch.from_numpy(head_tokens(corpus.token_mass(len(ends.embedding)), HEAD_TOKENS, frozenset()))
    student = Student(student_config(load_config(target), variant.layers, variant.width), ends, ids)
    start_from(student, target, variant.layers, variant.width)
    recipe = Recipe(
        loss=variant.loss,
        learning_rate=LEARNING_RATE,
        train_tokens=train_tokens,
        batch_tokens=BATCH_TOKENS,
        seed=0,
        num_draft_tokens=NUM_DRAFT_TOKENS,
        autocast=False,
        max_held_out=max_held_out,
    )
    return Trainer(student, recipe, torch.device("cpu"), len(ends.embedding), Progress({}))


def _figures(trainer: Trainer, variant: Variant, target: Path, corpus: Corpus, out: Path) -> dict[str, object]:
    student, done = trainer.student, trainer.progress
    last = _trainer(variant, target, corpus, BATCH_TOKENS, NUM_HELD_OUT)
    last.student.load_state_dict(student.state_dict())
    figures = last.figures(corpus)
    digest = directory_vocab_digest(target)
    manifest = Manifest(str(target), read_ends(target).digest, digest, len(student.embedding), layers=variant.layers)
    student.export(out, manifest, torch.bfloat16)
    runners = [
        load_engine(EngineOptions(str(model), cache_dir(), num_blocks=32), Reporter(quiet=True)).runner
        for model in (target, out)
    ]
    costs = measure_costs(runners[0], runners[1], NUM_DRAFT_TOKENS)
    return {
        **asdict(variant),
        "num_parameters": sum(parameter.numel() for parameter in student.trained().values()),
        "trained_tokens": done.num_tokens,
        "training_s": round(done.trained_s, 1),
        "held_out": asdict(figures),
        "draft_cost": round(costs.draft, 4),
        "verify_cost": round(costs.verify, 4),
        "expected_speed_up": round(costs.speed_up(figures.mean_acceptance_len, NUM_DRAFT_TOKENS), 4),
        "curve": done.curve,
    }
