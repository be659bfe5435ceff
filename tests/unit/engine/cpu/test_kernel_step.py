"""A step by kernels, whole or in part, gives what PagedStep gives, and reads nothing that is not its sequence's own."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ModelUnsupported
from services.engine.cpu import attention, kernel_step
from services.engine.cpu.kernel_step import KernelStep, num_for_kernel
from services.engine.cpu.loading import load_kernels
from services.engine.kv_pool import KvPool, LayerShape
from services.engine.paged_attention import LayerCall, PagedStep
from services.engine.paged_model import EngineOptions, load_engine
from services.engine.progress import Reporter
from services.engine.step import Work
from services.engine.step_layout import build_layout
from tests.tiny_models import SUPPORTED_FAMILIES, save_model
from tests.unit.engine.test_step_layout import sequence

BLOCK_SIZE = 4
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def _shared_by_few_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the number of pairs, the kernel takes all threads of torch, which is one but where a test says more."""
    monkeypatch.setattr(kernel_step, "_MIN_SHARED_PAIRS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Attentions:
    """The same step by kernels and by torch, over pools of the same content."""

    def __init__(self, works: list[Work], dtype: torch.dtype, num_heads: int, num_kv_heads: int, dim: int) -> None:
        self.works, self.num_heads, self.num_kv_heads, self.dim = works, num_heads, num_kv_heads, dim
        self.generator = torch.Generator().manual_seed(dim)
        num_blocks = 1 + max(block for work in works for block in work.sequence.block_table)
        self.pools = [
            KvPool((LayerShape(num_kv_heads, dim, dim),), num_blocks, BLOCK_SIZE, dtype, CPU) for _ in range(2)
        ]
        for stored in zip(*(pool.layer(0) for pool in self.pools), strict=True):
            stored[0].copy_(self.normal(*stored[0].shape))
            stored[1].copy_(stored[0])
        self.num_tokens = sum(work.num_computed_tokens for work in works)
        self.heads = self.normal(self.num_tokens, num_heads + 2 * num_kv_heads, dim).to(dtype)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        angles = self.normal(1, self.num_tokens, self.dim // 2).repeat(1, 1, 2)
        return angles.cos().to(self.heads.dtype), angles.sin().to(self.heads.dtype)

    def steps(self, num_works: int) -> tuple[KernelStep, PagedStep]:
        kernels = load_kernels(self.heads.dtype)
        assert kernels is not None
        ungrouped = build_layout(self.works, BLOCK_SIZE, CPU, grouped=False)
        mixed = KernelStep(kernels, self.pools[0], ungrouped, self.works, num_works)
        return mixed, PagedStep(self.pools[1], build_layout(self.works, BLOCK_SIZE, CPU))

    def both(
        self,
        call: LayerCall,
        embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        num_threads: int = 1,
        num_works: int | None = None,
    ) -> list[torch.Tensor]:
        """(tokens, heads, dim) by kernels for so many works, in so many threads, and by torch."""
        found = []
        torch.set_num_threads(num_threads)
        for step in self.steps(num_works or len(self.works)):
            if embeddings is not None:
                found.append(step.attend_heads(call, self.heads, self.num_heads, step.rotation(embeddings)))
            else:
                parts = self.heads.split_with_sizes((self.num_heads, self.num_kv_heads, self.num_kv_heads), 1)
                found.append(step.attend(call, *parts))
        return found


@st.composite
def steps(draw: st.DrawFn) -> list[Work]:
    sizes = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), min_size=1, max_size=5))
    blocks = list(range(sum(-(-(cached + new) // BLOCK_SIZE) for cached, new in sizes) + 2))
    random.Random(draw(st.integers(0, 99))).shuffle(blocks)
    works = []
    for cached, new in sizes:
        table = [blocks.pop() for _ in range(-(-(cached + new) // BLOCK_SIZE))]
        works.append(Work(sequence([1] * (cached + new), cached, table), new, None, 1))
    return works


@settings(deadline=None, max_examples=150)
@given(
    works=steps(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from([(9, 3, 64), (4, 4, 8), (6, 2, 20), (1, 1, 2)]),
    window=st.sampled_from([None, 1, 5, 12]),
    softcap=st.sampled_from([None, 4.0]),
    scaling=st.sampled_from([None, 0.7]),
    rotates=st.booleans(),
    num_threads=st.integers(1, 6),
    num_works=st.integers(1, 5),
)
def test_kernels_attend_as_torch_does(
    works: list[Work],
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    window: int | None,
    softcap: float | None,
    scaling: float | None,
    rotates: bool,
    num_threads: int,
    num_works: int,
) -> None:
    both = Attentions(works, dtype, *shape)
    embeddings = both.embeddings() if rotates else None
    call = LayerCall(0, scaling, window, softcap)
    mixed, paged = both.both(call, embeddings, num_threads, min(num_works, len(works)))
    torch.testing.assert_close(mixed.float(), paged.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for kept, expected in zip(*(pool.layer(0) for pool in both.pools), strict=True):
        torch.testing.assert_close(kept, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_threads_without_a_part_add_nothing() -> None:
    both = Attentions([Work(sequence([1] * n, n - 1, [n]), 1, None, 1) for n in (1, 3, 1)], torch.float32, 4, 2, 8)
    expected, _ = both.both(LayerCall(0, None, None, None), None, 1)
    for num_threads in range(2, 12):
        found, _ = both.both(LayerCall(0, None, None, None), None, num_threads)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_shows_in_its_own_sequence_alone(dtype: torch.dtype, num_threads: int) -> None:
    """Slots behind a sequence's end, of its last block and of others, are not read either."""
    works = [
        Work(sequence([1] * 9, 8, [5, 1, 3]), 1, None, 1),
        Work(sequence([1] * 6, 5, [0, 4]), 1, None, 1),
    ]
    both = Attentions(works, dtype, 4, 2, 8)
    keys, values = both.pools[0].layer(0)
    for pool in (keys, values):
        pool[2] = float("nan")
        pool[3, 1:] = float("nan")
        pool[4, 2:] = float("nan")
    call = LayerCall(0, None, None, None)
    embeddings = both.embeddings()
    whole, _ = both.both(call, embeddings, num_threads)
    assert whole.isfinite().all()
    keys[1, 2, 0, 3] = float("nan")
    faulty, _ = both.both(call, embeddings, num_threads)
    assert not faulty[0].isfinite().all()
    assert torch.equal(faulty[0, 2:], whole[0, 2:]), "the other key head's"
    assert torch.equal(faulty[1], whole[1])


def rows_at(num_cached: int, num_tokens: int = 1) -> Work:
    return Work(sequence([1] * (num_cached + num_tokens), num_cached, []), num_tokens)


@pytest.mark.parametrize(
    ("works", "expected"),
    [
        ([rows_at(3999)], 1),
        ([rows_at(250)] * 16, 16),
        ([rows_at(800, 8)], 1),
        ([rows_at(200, 5)] * 16, 16),
        ([*[rows_at(800)] * 4, rows_at(3900, 4)], 5),
        ([*[rows_at(800)] * 4, rows_at(1000, 200)], 4),
        ([rows_at(1000, 200), *[rows_at(800)] * 4], 0),  # only from the first on
        ([rows_at(0, 300)], 0),
    ],
)
def test_the_kernel_attends_for_rows_and_torch_for_what_is_long(works: list[Work], expected: int) -> None:
    assert num_for_kernel(works, 3, 16) == expected


class Watched(KernelStep):
    """Counts itself."""

    num_made = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Watched.num_made += 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_family_runs_by_kernels_and_passes_the_check_at_load(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.engine.model_runner.KernelStep", Watched)
    Watched.num_made = 0
    options = EngineOptions(str(save_model(tmp_path, family, sliding_window=9)), tmp_path, dtype=dtype, num_blocks=64)
    engine = load_engine(options, Reporter(quiet=True))
    assert Watched.num_made
    assert engine.self_check_difference < (1e-5 if dtype == "float32" else 5e-2)


def test_the_check_at_load_sees_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = KernelStep.attend_heads

    def scaled(self: KernelStep, *arguments: Any) -> torch.Tensor:
        return whole(self, *arguments) * 1.5

    monkeypatch.setattr(KernelStep, "attend_heads", scaled)
    with pytest.raises(ModelUnsupported, match="differs from its own attention"):
        load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=64), Reporter(quiet=True))


def greedy_text(directory: Path, num_tokens: int) -> list[int]:
    """A token a step, from the loaded model."""
    options = EngineOptions(str(directory), directory, num_blocks=64, block_size=BLOCK_SIZE)
    runner = load_engine(options, Reporter(quiet=True)).runner
    text = sequence([5, 6, 7], 0, list(range(32)))
    while len(text.tokens) < num_tokens:
        logits = runner.forward([Work(text, len(text.tokens) - text.num_cached, None, 1)])
        text.num_cached = len(text.tokens)
        text.tokens.append(int(logits[0].argmax()))
    return text.tokens


def test_without_numba_torch_writes_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_model(tmp_path)
    expected = greedy_text(directory, 60)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr("services.engine.fused.load_kernels", load_kernels.__wrapped__)
    monkeypatch.setattr("services.engine.model_runner.KernelStep", None)
    assert greedy_text(directory, 60) == expected


def test_kernels_are_compiled_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUTRIDER_CACHE_DIR", str(tmp_path / "file" / "cache"))
    kernels = load_kernels.__wrapped__(torch.float32)
    assert kernels is not None
    hidden, weight, out = torch.tensor([[3.0, 4.0]]), torch.ones(2), torch.zeros(1, 2)
    kernels.add_rms_norm(hidden.data_ptr(), 0, weight.data_ptr(), out.data_ptr(), 1, 2, 0.0)
    torch.testing.assert_close(out, torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_whatever_is_computed_beside_it(dtype: torch.dtype, window: int | None) -> None:
    """Else plain and speculative decoding would part at near-ties."""
    call, tables = LayerCall(0, None, window, None), [list(range(0, 200, 2)), list(range(1, 200, 2))]
    cached = attention._CHUNK - 3
    beside = Work(sequence([1] * 330, 321, tables[1]), 9, None, 1)
    together = [Work(sequence([1] * (cached + 5), cached, tables[0]), 5, None, 1), beside]
    both = Attentions(together, dtype, 9, 3, 16)
    embeddings = both.embeddings()
    expected, _ = both.both(call, embeddings, 3)
    for row in range(5):
        work = Work(sequence([1] * (cached + row + 1), cached + row, tables[0]), 1, None, 1)
        alone = Attentions([work], dtype, 9, 3, 16)
        for pool, filled in zip(alone.pools, both.pools, strict=True):
            for stored, content in zip(pool.layer(0), filled.layer(0), strict=True):
                stored.copy_(content[: len(stored)])
        alone.heads = both.heads[row : row + 1].contiguous()
        found, _ = alone.both(call, tuple(table[:, row : row + 1] for table in embeddings), 2)
        assert torch.equal(found[0], expected[row])
