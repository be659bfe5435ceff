"""A name becomes a checked engine, and a step passes its logits to verification or sampling."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

import pytest
import torch
import transformers

from services.common.config import cache_dir
from services.common.errors import ConfigError, Internal, ModelUnsupported
from services.common.items import Identity, Open, Proposed, Refused, TargetItem, Tokens
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.draft.core import DraftCore
from services.engine.block_manager import BlockManager
from services.engine.cuda.runner import TileRunner
from services.engine.draft_verifier import DraftVerifier
from services.engine.drafters.base import Drafter
from services.engine.drafters.model import ModelDrafter
from services.engine.drafters.ngram import NgramDrafter
from services.engine.drafters.staged import StagedDrafter
from services.engine.paged_model import (
    EngineOptions,
    PagedDraftModel,
    PagedEngine,
    PagedTargetModel,
    load_engine,
)
from services.engine.prepare import SAMPLE_NAME
from services.engine.progress import Reporter
from services.engine.sampler import Sampler
from services.engine.sequence import Sequence
from services.engine.step import Sampled, Verdict, Work
from services.engine.step_layout import build_layout
from services.engine.verifier import Verifier
from services.target.core import TargetCore
from tests.tiny_models import save_model
from tests.unit.engine.cuda.plain_kernels import PlainKernels
from tests.unit.item_builders import close, decode, identity, open_item, propose, verify

QUIET = Reporter(quiet=True)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Greedy:
    """Verifies and samples by argmax, one row a work."""

    def verify(self, works: list[Work], logits: torch.Tensor) -> list[Verdict | None]:
        best = iter(logits.argmax(-1).tolist())
        return [Verdict((next(best),), 0) if work.num_rows else None for work in works]

    def sample(self, works: list[Work], logits: torch.Tensor) -> list[Sampled | None]:
        return [Sampled(v.token_ids[0], None) if v else None for v in self.verify(works, logits)]


def open_sequence(prefix: list[int]) -> Sequence:
    identity = Identity("s", 0, 0, 0, len(prefix))
    return Sequence.from_open(
        Open(identity, tuple(prefix), len(prefix), frozenset(), SamplingParams(), VerificationMethod.COUPLED, 100)
    )


def greedy_tokens(engine: PagedEngine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Decodes all prompts together through the target's step."""
    target, blocks = PagedTargetModel(engine, Greedy()), BlockManager(engine.num_blocks, engine.block_size)
    sequences = [open_sequence(prompt) for prompt in prompts]
    for _ in range(num_tokens):
        for sequence in sequences:
            blocks.extend(sequence, len(sequence))
        verdicts = target.step([Work(sequence, sequence.num_uncached_tokens, None, 1) for sequence in sequences])
        for sequence, verdict in zip(sequences, verdicts, strict=True):
            assert verdict is not None
            sequence.num_cached = len(sequence)
            sequence.tokens.extend(verdict.token_ids)
    return [sequence.tokens[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


def generated_tokens(directory: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers' own `generate` makes of a prompt, greedily and without an end of sequence."""
    module = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    module.generation_config.eos_token_id = None
    output = module.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    generated: list[int] = output[0, len(prompt) :].tolist()
    return generated


def test_a_directory_becomes_an_engine_that_tells_what_it_is(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "tiny", "llama", vocab_size=300)
    engine = load_engine(EngineOptions(str(directory), tmp_path, kv_memory_bytes=1 << 20, block_size=8), QUIET)
    assert (engine.info.name, engine.info.vocab_size, engine.info.dtype, engine.info.device) == (
        "tiny",
        300,
        "float32",
        "cpu",
    )
    assert (len(engine.info.digest), len(engine.info.vocab_digest)) == (64, 64)
    assert (engine.eos_token_ids, engine.max_sequence_len) == (frozenset({0}), 512)
    assert engine.num_blocks == (1 << 20) // (2 * 2 * 8 * 8 * 2 * 4)
    assert engine.self_check_difference < 1e-5


def test_a_given_name_and_number_of_blocks_are_used(tmp_path: Path) -> None:
    options = EngineOptions(str(save_model(tmp_path)), tmp_path, name="mine", num_blocks=5)
    engine = load_engine(options, QUIET)
    assert (engine.info.name, engine.num_blocks, engine.runner.pool.num_blocks) == ("mine", 5, 5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("num_drafted", [0, 3])
def test_a_target_tells_the_hidden_states_that_its_tokens_were_chosen_from(
    family: str, num_drafted: int, tmp_path: Path
) -> None:
    directory = save_model(tmp_path / "tiny", family)
    engine = load_engine(EngineOptions(str(directory), tmp_path, num_blocks=64), QUIET)
    core = TargetCore(
        PagedTargetModel(engine, Verifier()),
        BlockManager(64, 16),
        max_sequences=8,
        max_sequence_len=200,
        max_draft_tokens=4,
    )
    prompts = {name: tuple(range(3, 8 + 5 * i)) for i, name in enumerate("abc")}
    openings = [replace(open_item(n, p, eos_token_ids=frozenset()), features=n != "b") for n, p in prompts.items()]
    plain = {n: run_core(core, [o, decode(n, len(prompts[n]), 5)])[n] for n, o in zip(prompts, openings, strict=True)}
    whole = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = []
    for name, prompt in prompts.items():  # the first of the drafted tokens are right, of "c" only one
        tokens = plain[name][0]
        right = tokens[: 1 if name == "c" else num_drafted][:num_drafted]
        asked += [
            replace(openings["abc".index(name)], identity=identity(name, base_len=len(prompt), attempt=2)),
            verify(name, len(prompt), tuple(right) + (9,) * (num_drafted - len(right)), attempt=2),
        ]
    verified = run_core(core, asked)
    for name, prompt in prompts.items():
        for tokens, features in (plain[name], verified[name]):
            if name == "b":
                assert features == b""
                continue
            context = torch.tensor([[*prompt, *tokens]])
            with torch.no_grad():
                hidden = whole.base_model(input_ids=context).last_hidden_state[0, len(prompt) - 1 : -1]
            told = torch.frombuffer(bytearray(features), dtype=torch.float16).view(len(tokens), -1).float()
            torch.testing.assert_close(told, hidden, rtol=2e-3, atol=2e-3)
    assert len(verified["a"][0]) == num_drafted + 1
    assert len(verified["c"][0]) == (2 if num_drafted else 1)


def run_core(core: TargetCore, items: list[TargetItem]) -> dict[str, tuple[list[int], bytes]]:
    """Each session's new tokens and their features."""
    results = core.handle(1, items)
    while core.has_work:
        results += core.step()
    found: dict[str, tuple[list[int], bytes]] = {}
    for _, result in results:
        assert isinstance(result, Tokens), result
        tokens, features = found.setdefault(result.identity.session_id, ([], b""))
        found[result.identity.session_id] = [*tokens, *result.token_ids], features + result.features
    return found


def test_draft_and_target_steps_answer_works_with_rows_only(tmp_path: Path) -> None:
    engine = load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=8), QUIET)
    blocks, sequences = BlockManager(8, 16), [open_sequence([5, 6, 7]), open_sequence([8, 9])]
    for sequence in sequences:
        blocks.extend(sequence, len(sequence))
    works = [Work(sequences[0], 2), Work(sequences[1], 2, None, 1)]
    target, draft = PagedTargetModel(engine, Greedy()), PagedDraftModel(engine, Greedy())
    none, verdict = target.step(works)
    assert none is None
    assert verdict is not None
    assert draft.step(works) == [None, Sampled(verdict.token_ids[0], None)]
    assert target.info is draft.info is engine.info


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_greedy_decoding_in_a_batch_is_that_of_generate(tmp_path: Path, family: str) -> None:
    directory = save_model(tmp_path, family)
    engine = load_engine(EngineOptions(str(directory), tmp_path, num_blocks=32), QUIET)
    prompts = [[7, 8, 9, 10], [30] * 20]
    expected = [generated_tokens(directory, prompt, 24) for prompt in prompts]
    assert greedy_tokens(engine, prompts, 24) == expected


def test_the_real_verifier_accepts_what_the_real_sampler_drafted_from_the_same_model(tmp_path: Path) -> None:
    engine = load_engine(EngineOptions(str(save_model(tmp_path, peakedness=1.0)), tmp_path, num_blocks=8), QUIET)
    sampling = SamplingParams(temperature=1.0, seed=11, repetition_penalty=1.2, presence_penalty=0.5)
    sequence = replace(open_sequence([5, 6, 7]), sampling=sampling)
    BlockManager(8, 16).extend(sequence, 8)
    draft, target = PagedDraftModel(engine, Sampler()), PagedTargetModel(engine, Verifier())
    drafted: list[int] = []
    for _ in range(4):
        (sampled,) = draft.step([Work(sequence, sequence.num_uncached_tokens, None, 1)])
        assert sampled is not None
        sequence.num_cached = len(sequence)
        sequence.tokens.append(sampled.token_id)
        drafted.append(sampled.token_id)
    sequence.tokens, sequence.num_cached = [5, 6, 7], 0
    (verdict,) = target.step([Work(sequence, 3, Proposal(0, tuple(drafted)), 5)])
    assert verdict is not None
    assert verdict.num_accepted_tokens == 4
    assert verdict.token_ids[:4] == tuple(drafted)


def test_bad_settings_stop_the_load_before_any_download(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        load_engine(EngineOptions("sample", tmp_path, dtype="int4"), QUIET)
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="Bloom"):
        load_engine(EngineOptions(str(save_model(tmp_path, "bloom")), tmp_path), QUIET)


@pytest.mark.sample_model
def test_the_sample_model_decodes_as_generate_does() -> None:
    directory = cache_dir() / "models" / SAMPLE_NAME
    if not directory.is_dir():
        pytest.skip("the sample model is not in the cache; `python -m services.engine.prepare sample` puts it there")
    engine = load_engine(EngineOptions("sample", cache_dir(), num_blocks=64, num_threads=2), QUIET)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = ["Write a short story about a lighthouse.", "List five facts about the moon, please. 123 + 456 = ?"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in texts
    ]
    expected = [generated_tokens(directory, prompt, 16) for prompt in prompts]
    assert greedy_tokens(engine, prompts, 16) == expected


def test_a_sequence_without_finite_logits_ends_alone_and_leaves_no_trace(tmp_path: Path) -> None:
    """Its prompt has a token whose embedding is not a number. Others go on, one of them in its blocks."""
    bad, engine = 7, load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=8), QUIET)
    with torch.inference_mode():
        engine.runner.model.module.get_input_embeddings().weight[bad] = torch.nan
    results: dict[str, list[object]] = {}

    def core_of() -> TargetCore:
        blocks = BlockManager(engine.num_blocks, engine.block_size)
        model = PagedTargetModel(engine, Verifier())
        return TargetCore(model, blocks, max_sequences=8, max_sequence_len=100, max_draft_tokens=4)

    def run(core: TargetCore, **prompts: tuple[int, ...]) -> None:
        for name, prompt in prompts.items():
            core.handle(1, [open_item(name, prompt, max_new_tokens=6), decode(name, len(prompt), 6)])
        while core.has_work:
            for _, result in core.step():
                results.setdefault(result.identity.session_id, []).append(result)
            core.check_integrity()

    def tokens(name: str) -> list[int]:
        return [token for result in results[name] for token in result.token_ids]

    run(core_of(), alone=(5, 6, 8))
    core = core_of()
    run(core, other=(5, 6, 8), broken=(5, bad, *range(10, 50)))
    assert tokens("other") == tokens("alone")
    (refused,) = results["broken"]
    assert isinstance(refused, Refused)
    assert "not finite" in str(refused.error)
    run(core, **{f"later{n}": (5, 6, 8) for n in range(4)})
    assert all(tokens(f"later{n}") == tokens("alone") for n in range(4))
    assert engine.runner.pool.is_finite(range(engine.num_blocks))


def test_a_shorter_sequence_beside_one_without_finite_logits_goes_on(tmp_path: Path) -> None:
    """The broken one has the pool's first block, and one block more than the other."""
    bad, engine = 7, load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=16), QUIET)
    with torch.inference_mode():
        engine.runner.model.module.get_input_embeddings().weight[bad] = torch.nan
    blocks, model = BlockManager(16, engine.block_size), PagedTargetModel(engine, Verifier())
    broken, other = open_sequence([5, bad, *range(10, 89)]), open_sequence(list(range(30, 110)))
    works = [Work(sequence, len(sequence), None, 1) for sequence in (broken, other)]
    for sequence in (broken, other):
        blocks.extend(sequence, len(sequence))
    assert (len(broken.block_table), len(other.block_table), broken.block_table[0]) == (6, 5, 0)
    (group,) = build_layout(works, engine.block_size, torch.device("cpu")).groups
    assert group.batch == 2
    error, verdict = model.step(works)
    assert isinstance(error, Internal)
    assert isinstance(verdict, Verdict)


BROKEN = (5, 7, *range(10, 50))
"""7 is the bad token; its block is full, and would be in the prefix index."""


def engine_with_a_bad_token(path: Path) -> PagedEngine:
    engine = load_engine(EngineOptions(str(save_model(path)), path, num_blocks=8), QUIET)
    with torch.inference_mode():
        engine.runner.model.module.get_input_embeddings().weight[7] = torch.nan
    return engine


def test_a_prefill_that_is_not_finite_ends_its_sequence_before_others_read_its_blocks(tmp_path: Path) -> None:
    engine = engine_with_a_bad_token(tmp_path)
    blocks, model = BlockManager(8, engine.block_size), PagedTargetModel(engine, Verifier())
    core = TargetCore(model, blocks, max_sequences=8, max_sequence_len=100, max_draft_tokens=4)
    good = partial(open_item, prefix=(5, 6, 8), max_new_tokens=20)
    alone = run_core(core, [good("alone"), decode("alone", 3, 6)])["alone"]
    assert run_core(core, [open_item("broken", BROKEN, max_new_tokens=20)]) == {}
    assert engine.runner.pool.is_finite(range(8))
    (refused,) = core.handle(1, [decode("broken", len(BROKEN), 6)])
    assert "not finite" in str(refused[1].error)
    for name in ("gone", "same"):
        assert run_core(core, [open_item(name, BROKEN, max_new_tokens=20), good(name + "-other")]) == {}
        core.handle(1, [close(name)])
    assert run_core(core, [decode("gone-other", 3, 6)])["gone-other"] == alone
    core.check_integrity()
    assert engine.runner.pool.is_finite(range(8))


def test_a_drafts_prefill_that_is_not_finite_leaves_no_trace(tmp_path: Path) -> None:
    engine = engine_with_a_bad_token(tmp_path)
    drafter = ModelDrafter(PagedDraftModel(engine, Sampler()), BlockManager(8, engine.block_size), prefill_budget=32)
    core = DraftCore(drafter, max_sequences=8, max_sequence_len=100, max_draft_tokens=4)
    assert not core.handle(1, [open_item("broken", BROKEN, max_new_tokens=20)])
    while core.has_work:
        core.step()
        assert engine.runner.pool.is_finite(range(8))
    core.check_integrity()


def test_a_fault_in_blocks_that_others_read_ends_them_all(tmp_path: Path) -> None:
    engine = load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=8), QUIET)
    blocks, model = BlockManager(8, engine.block_size), PagedTargetModel(engine, Verifier())
    sequence = open_sequence(list(range(1, 40)))
    blocks.extend(sequence, 39)
    model.step([Work(sequence, 32)])
    sequence.num_cached = 32
    blocks.share(sequence)
    assert sequence.num_shared_blocks == 2
    engine.runner.pool.layer(0)[0][sequence.block_table[0], 3] = torch.nan
    with pytest.raises(Internal, match="not finite"):
        model.step([Work(sequence, 7, None, 1)])
    assert engine.runner.pool.is_finite(range(engine.num_blocks))


def test_clearing_reaches_the_spare_block_of_a_runner_in_tiles(tmp_path: Path) -> None:
    engine = load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=8), QUIET)
    runner = TileRunner(engine.runner.model, 8, engine.block_size, PlainKernels())
    assert runner.pool.num_blocks > engine.num_blocks
    runner.pool.layer(0)[1].fill_(torch.nan)
    replace(engine, runner=runner).clear()
    assert runner.pool.is_finite(range(runner.pool.num_blocks))


@pytest.mark.parametrize("kind", ["model", "chunked", "staged"])
def test_a_draft_without_finite_logits_ends_its_own_proposal_alone_and_leaves_no_trace(
    kind: str, tmp_path: Path
) -> None:
    """Its prompt has a token whose embedding is not a number. Others go on, one of them in its blocks."""
    bad, engine = 7, load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=8), QUIET)
    with torch.inference_mode():
        engine.runner.model.module.get_input_embeddings().weight[bad] = torch.nan

    def core_of() -> DraftCore:
        blocks = BlockManager(8, engine.block_size)
        budget = 32 if kind == "chunked" else 512
        drafter: Drafter = ModelDrafter(PagedDraftModel(engine, Sampler()), blocks, prefill_budget=budget)
        if kind == "staged":
            model = PagedTargetModel(engine, DraftVerifier())
            drafter = StagedDrafter(NgramDrafter(), model, blocks, num_draft_tokens=2)
        return DraftCore(drafter, max_sequences=8, max_sequence_len=100, max_draft_tokens=4)

    def run(core: DraftCore, **prompts: tuple[int, ...]) -> list[tuple[int, ...]]:
        items = [(open_item(n, p, max_new_tokens=20), propose(n, len(p), (), 3)) for n, p in prompts.items()]
        results = core.handle(1, [item for pair in items for item in pair])
        while core.has_work:
            results += core.step()
            core.check_integrity()
        drafted = {r.identity.session_id: r.proposal.token_ids for _, r in results if isinstance(r, Proposed)}
        return [drafted[name] for name in prompts]

    (alone,) = run(core_of(), alone=(5, 6, 8))
    core = core_of()
    other, broken = run(core, other=(5, 6, 8), broken=(5, bad, *range(10, 50)))
    assert other == alone
    assert broken == () or kind == "chunked", "what was zeroed before the first row has finite logits"
    core.handle(1, [close("broken"), close("other")])
    for n in range(5):
        assert run(core, **{f"later{n}": (5, 6, 8)}) == [alone]


@pytest.mark.parametrize(
    "sampling", [SamplingParams(top_p=0.0), SamplingParams(min_p=2.0), SamplingParams(logit_bias=((3, inf),))], ids=str
)
def test_sampling_without_a_distribution_ends_nobody_else(sampling: SamplingParams, tmp_path: Path) -> None:
    engine = load_engine(EngineOptions(str(save_model(tmp_path)), tmp_path, num_blocks=8), QUIET)
    model, blocks = PagedTargetModel(engine, Verifier()), BlockManager(8, engine.block_size)
    core = TargetCore(model, blocks, max_sequences=8, max_sequence_len=100, max_draft_tokens=4)
    bad = open_item("bad", (5, 6, 7), sampling=sampling, max_new_tokens=5)
    good = open_item("good", (5, 6, 8), max_new_tokens=5)
    results = core.handle(1, [good, decode("good", 3, 2), bad, decode("bad", 3, 2)])
    while core.has_work:
        results += core.step()
    assert [type(r) for _, r in results if r.identity.session_id == "bad"] == [Refused, Refused]
    assert [type(r) for _, r in results if r.identity.session_id == "good"] == [Tokens, Tokens]
