"""The engine on a CUDA device gives what it gives on the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.common.items import Identity, Open
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.engine import noise, noise_torch
from services.engine.block_manager import BlockManager
from services.engine.paged_model import EngineOptions, PagedEngine, PagedTargetModel, load_engine
from services.engine.progress import Reporter
from services.engine.sequence import Sequence
from services.engine.step import Verdict, Work
from services.engine.verifier import Verifier
from tests.feature_drafts import export, feature_student
from tests.tiny_models import HIDDEN_SIZE, SUPPORTED_FAMILIES, save_model
from tests.unit.engine.feature_cores import drafted_by, feature_core, feature_model
from tests.unit.item_builders import open_item, propose

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], list(range(20, 60))]
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}


def load(directory: Path, device: str, dtype: str = "float32") -> PagedEngine:
    options = EngineOptions(str(directory), directory, dtype=dtype, device=device, num_blocks=64)
    return load_engine(options, Reporter(quiet=True))


def decode(engine: PagedEngine, sampling: SamplingParams, num_steps: int) -> list[list[int]]:
    """Verifies a proposal that is wrong from its second token on, for all prompts at once, step after step."""
    model, blocks = PagedTargetModel(engine, Verifier()), BlockManager(engine.num_blocks, engine.block_size)
    sequences = [
        Sequence.from_open(
            Open(
                Identity(str(i), 1, 1, 0, len(prompt)),
                tuple(prompt),
                len(prompt),
                frozenset(),
                sampling,
                VerificationMethod.COUPLED,
                200,
            )
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    for _ in range(num_steps):
        works = []
        for sequence in sequences:
            proposal = Proposal(0, (sequence.tokens[-1], 3, 4))
            blocks.extend(sequence, len(sequence) + 3)
            works.append(Work(sequence, sequence.num_uncached_tokens, proposal, 4))
        for sequence, verdict in zip(sequences, model.step(works), strict=True):
            assert isinstance(verdict, Verdict)
            length = len(sequence)
            sequence.tokens.extend(verdict.token_ids)
            blocks.truncate(sequence, length + verdict.num_accepted_tokens)
            sequence.num_cached = length + verdict.num_accepted_tokens
    blocks.check_integrity(sequences)
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_the_self_check_passes(tmp_path: Path, family: str, dtype: str) -> None:
    assert load(save_model(tmp_path, family), "cuda", dtype).self_check_difference <= TOLERANCES[dtype]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_the_host(tmp_path: Path, temperature: float) -> None:
    directory = save_model(tmp_path)
    sampling = SamplingParams(temperature=temperature, seed=11, top_p=0.95)
    host, device = (decode(load(directory, name), sampling, 30) for name in ("cpu", "cuda"))
    assert device == host


def test_noise_words_are_bit_identical() -> None:
    seeds, indices = [1, 2**63 + 5, 2**64 - 1], [0, 7, 2**31]
    keys = noise_torch.KeyTensors(
        torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64)).cuda(),
        torch.tensor(indices).cuda(),
        torch.full((3,), int(noise.Purpose.COUPLED)).cuda(),
        torch.zeros(3, dtype=torch.int64).cuda(),
    )
    device = noise_torch.words(keys, 1003).cpu().numpy()
    for row, (seed, index) in enumerate(zip(seeds, indices, strict=True)):
        host = noise.words(noise.NoiseKeys([seed], [index], noise.Purpose.COUPLED), np.arange(1003))
        np.testing.assert_array_equal(device[row], np.asarray(host).ravel())


def load_cuda(directory: Path, cuda_graph_rows: int = 64, compile: bool = False) -> PagedEngine:
    options = EngineOptions(
        str(directory), directory, device="cuda", num_blocks=64, cuda_graph_rows=cuda_graph_rows, compile=compile
    )
    return load_engine(options, Reporter(quiet=True))


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SamplingParams(seed=11, top_k=20)])
def test_replayed_steps_give_the_tokens_of_launched_ones(tmp_path: Path, sampling: SamplingParams) -> None:
    directory = save_model(tmp_path)
    replayed, launched = (decode(load_cuda(directory, rows), sampling, 30) for rows in (64, 0))
    assert replayed == launched


def told(engine: PagedEngine) -> list[torch.Tensor]:
    """What a target tells of the tokens behind the prompts, of which two were drafted wrongly."""
    model, blocks = PagedTargetModel(engine, Verifier()), BlockManager(engine.num_blocks, engine.block_size)
    works = []
    for i, prompt in enumerate(PROMPTS):
        opening = open_item(str(i), tuple(prompt), eos_token_ids=frozenset())
        sequence = Sequence.from_open(replace(opening, features=True))
        blocks.extend(sequence, len(sequence) + 3)
        works.append(Work(sequence, len(prompt), Proposal(0, (3, 4)), 3))
    verdicts = model.step(works)
    return [torch.frombuffer(bytearray(v.features), dtype=torch.float16).float() for v in verdicts if v]


@pytest.mark.parametrize("cuda_graph_rows", [64, 0])
def test_features_are_those_of_the_host(tmp_path: Path, cuda_graph_rows: int) -> None:
    directory = save_model(tmp_path)
    for host, device in zip(told(load(directory, "cpu")), told(load_cuda(directory, cuda_graph_rows)), strict=True):
        assert len(host)
        torch.testing.assert_close(device, host, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cuda_graph_rows", [64, 0])
def test_a_head_on_features_drafts_what_it_drafts_on_the_host(tmp_path: Path, cuda_graph_rows: int) -> None:
    target = save_model(tmp_path / "target")
    draft = export(feature_student(target, strength=0.5), target, tmp_path / "draft")
    rows = torch.randn(6, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1)).half().numpy()

    def drafted(device: str) -> list[list[int]]:
        core = feature_core(draft, feature_model(draft, device, cuda_graph_rows))
        opening = open_item(prefix=tuple(PROMPTS[2]), eos_token_ids=frozenset())
        first = replace(propose("a", 43, (1, 2, 3), 4), features=rows[:3].tobytes())
        second = replace(propose("a", 46, (9, 8, 7), 4), features=rows[3:].tobytes())
        return [drafted_by(core, opening, first), drafted_by(core, second)]

    assert drafted("cuda") == drafted("cpu")


def test_compiled_blocks_give_the_same_tokens(tmp_path: Path) -> None:
    directory, sampling = save_model(tmp_path), SamplingParams(temperature=0.0)
    compiled, plain = (decode(load_cuda(directory, compile=flag), sampling, 30) for flag in (True, False))
    assert compiled == plain


def test_a_model_is_recorded_and_not_silently_launched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decode(load_cuda(save_model(tmp_path)), SamplingParams(temperature=0.0), 3)
    assert "runs without CUDA graphs" not in caplog.text


@pytest.mark.parametrize("rows", [64, 0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_waits_for_the_device_only_for_its_result(tmp_path: Path, temperature: float, rows: int) -> None:
    engine = load_cuda(save_model(tmp_path), rows)
    sampling = SamplingParams(temperature=temperature, seed=3, top_p=0.9, repetition_penalty=1.1)
    decode(engine, sampling, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(engine, sampling, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
