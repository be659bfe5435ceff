"""The simulated models: the target's function, the draft's agreement with it, and the pace of both."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from services.common.values import SamplingParams, VerificationMethod, derive_draft_seed
from services.common.vocab import SIMULATED_EOS, simulated_vocab, vocab_digest
from services.engine.block_manager import BlockManager
from services.engine.drafters.simulated import SimulatedDraft
from services.engine.sequence import Sequence
from services.engine.simulated import Pace, SimulatedTarget
from services.engine.step import Work
from tests.unit.item_builders import open_item, simulated_continuation

SAMPLED = SamplingParams(temperature=1.0, seed=5)


def rows_of(model: SimulatedTarget | SimulatedDraft, blocks: BlockManager, sequence: Sequence) -> Work:
    """The work that computes a whole sequence and its last row."""
    blocks.extend(sequence, len(sequence))
    return Work(sequence, len(sequence), num_rows=1)


def test_continuation_is_printable_and_depends_on_every_token() -> None:
    tokens = simulated_continuation(tuple(b"hello"), 50)
    assert all(32 <= token < 127 for token in tokens)
    for other in (b"hellp", b"iello", b"helo", b"helllo"):
        assert simulated_continuation(tuple(other), 50) != tokens


def test_seed_matters_only_at_temperature_above_zero() -> None:
    def tokens(temperature: float, seed: int) -> tuple[int, ...]:
        return simulated_continuation((1, 2), 20, SamplingParams(temperature=temperature, seed=seed))

    assert tokens(0.0, 1) == tokens(0.0, 2)
    assert tokens(1.0, 1) != tokens(1.0, 2)


def test_eos_comes_as_often_as_configured_and_not_before_min_tokens() -> None:
    lens = [len(simulated_continuation((n,), 200, eos_probability=0.1)) for n in range(60)]
    assert 7 < sum(lens) / len(lens) < 14
    blocks = BlockManager(8, 4)
    model = SimulatedTarget(blocks, eos_probability=1.0)
    for min_tokens, expects_eos in ((0, True), (1, False)):
        item = open_item(sampling=SamplingParams(temperature=0.0, min_tokens=min_tokens))
        (verdict,) = model.step([rows_of(model, blocks, Sequence.from_open(item))])
        assert verdict is not None
        assert (verdict.token_ids == (SIMULATED_EOS,)) == expects_eos


def test_log_probs_are_those_of_a_point_mass() -> None:
    blocks = BlockManager(8, 4)
    model = SimulatedTarget(blocks)
    (verdict,) = model.step([rows_of(model, blocks, Sequence.from_open(open_item(log_probs=True)))])
    assert verdict is not None
    assert verdict.log_probs == (0.0,)
    assert verdict.top_log_probs[0].token_ids == verdict.token_ids


def test_model_info_names_the_simulated_vocabulary() -> None:
    info = SimulatedTarget(BlockManager(1, 1)).info
    assert info.vocab_size == 257
    assert info.vocab_digest == vocab_digest(simulated_vocab())


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("verification", list(VerificationMethod))
def test_draft_agrees_with_the_target_as_often_as_configured(
    acceptance: float, verification: VerificationMethod
) -> None:
    blocks, num_drawn = BlockManager(2000, 2), 2000
    draft, target = SimulatedDraft(blocks, acceptance=acceptance, seed=3), SimulatedTarget(blocks)
    prefixes = [(n // 256, n % 256, 7) for n in range(num_drawn)]
    agreed = 0
    for start in range(0, num_drawn, 500):
        works, target_works = [], []
        for prefix in prefixes[start : start + 500]:
            sequence = Sequence.from_open(open_item(prefix=prefix, sampling=SAMPLED, verification=verification))
            target_works.append(rows_of(target, blocks, sequence))
            rejection = verification is VerificationMethod.REJECTION
            seed = derive_draft_seed(SAMPLED.seed) if rejection else SAMPLED.seed
            sampling = SamplingParams(temperature=1.0, seed=seed)
            its_draft = Sequence.from_open(open_item(prefix=prefix, sampling=sampling, verification=verification))
            its_draft.block_table = sequence.block_table
            works.append(Work(its_draft, len(prefix), num_rows=1))
        verdicts, drafted = target.step(target_works), draft.step(works)
        for verdict, token in zip(verdicts, drafted, strict=True):
            assert verdict is not None
            assert token is not None
            assert 32 <= token.token_id < 127
            agreed += verdict.token_ids == (token.token_id,)
        for work in target_works:
            blocks.free(work.sequence)
    tolerance = 4 * math.sqrt(acceptance * (1 - acceptance) / num_drawn)
    assert abs(agreed / num_drawn - acceptance) <= tolerance


class OversleepingTime:
    """A clock whose sleep is always late."""

    def __init__(self, late_s: float) -> None:
        self.now_s = 0.0
        self.late_s = late_s

    def clock(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s + self.late_s


def test_oversleeping_does_not_add_up_over_steps() -> None:
    time = OversleepingTime(late_s=0.002)
    pace = Pace(time.clock, time.sleep)
    for _ in range(100):
        pace.wait(pace.now_s, 0.010)
    assert time.now_s == pytest.approx(1.0, abs=0.0021)


def test_step_lasts_what_its_rows_and_prefill_cost() -> None:
    time, blocks = OversleepingTime(late_s=0.0), BlockManager(8, 4)
    pace = Pace(time.clock, time.sleep)
    model = SimulatedTarget(blocks, step_ms=100, row_ms=10, prefill_token_ms=1, pace=pace)
    model.step([rows_of(model, blocks, Sequence.from_open(open_item(prefix=(1, 2, 3, 4, 5)))) for _ in range(2)])
    assert time.now_s == pytest.approx(0.128)


def test_draft_step_lasts_the_same_for_one_sequence_and_many() -> None:
    time, blocks = OversleepingTime(late_s=0.0), BlockManager(8, 4)
    draft = SimulatedDraft(blocks, token_ms=10, pace=Pace(time.clock, time.sleep))
    draft.step([rows_of(draft, blocks, Sequence.from_open(open_item())) for _ in range(5)])
    assert time.now_s == pytest.approx(0.010)


def test_simulated_workers_need_no_torch() -> None:
    modules = ["services.target.core", "services.draft.core", "services.engine.engine_thread"]
    modules += [
        f"services.engine.drafters.{name}" for name in ("ngram", "model", "simulated", "suffix", "fallback", "staged")
    ]
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    result = subprocess.run(
        [sys.executable, "-c", blocked + f"import {', '.join(modules)}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
