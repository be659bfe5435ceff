"""A draft with a vocabulary of its own behind real cores and paged models: the target's tokens, whatever it drafts."""

from __future__ import annotations

import logging
import string

import pytest
import torch
from transformers import PreTrainedModel

from services.common.items import Decode, Identity, Open, Opened, Propose, Proposed, Tokens
from services.common.values import SamplingParams, VerificationMethod
from services.draft.core import DraftCore
from services.engine.drafters.fallback import FallbackDrafter
from services.engine.drafters.ngram import NgramDrafter
from services.engine.transcript import rewrite
from services.engine.verifier import Verifier
from services.engine.vocabulary_pair import VocabularyPair, match_vocabularies
from services.target.core import TargetCore
from tests.distribution.engine import draft_core, generate, target_core, translated_drafter
from tests.tiny_models import build_model
from tests.unit.item_builders import open_item, propose
from tests.vocabularies import byte_fallback, byte_level, characters, twin, vocabulary

LETTERS = ["?", *string.ascii_lowercase, " "]
OTHER_LETTERS = ["0", *reversed(LETTERS[1:]), "1", LETTERS[0]]
NUM_TOKENS = 16
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": ((5, 2.0),)},
    "coupled": {"temperature": 0.8, "top_p": 0.95},
}


def letters() -> tuple[PreTrainedModel, PreTrainedModel, VocabularyPair]:
    """A target whose tokens are letters, and itself with these in another order beside two others."""
    pair = match_vocabularies(vocabulary(characters(OTHER_LETTERS)), vocabulary(characters(LETTERS)))
    target = build_model("llama", vocab_size=len(LETTERS), seed=1, peakedness=2.0)
    return target, twin(target, pair, len(OTHER_LETTERS)), pair


def textbook() -> tuple[PreTrainedModel, PreTrainedModel, VocabularyPair]:
    """An OPT and a GPT-2 that know nothing of each other, each with its own byte-level BPE."""
    pair = match_vocabularies(
        vocabulary(byte_level("code", 330)), vocabulary(byte_level("sea", 300, ["</s>"]), eos="</s>")
    )
    return build_model("opt", vocab_size=300, seed=1), build_model("gpt2", vocab_size=330, seed=2), pair


def llama_for_opt() -> tuple[PreTrainedModel, PreTrainedModel, VocabularyPair]:
    """The draft's tokens begin with spaces, and it has bytes for the characters that it lacks."""
    mine = vocabulary(byte_fallback("code"), "<s>", "</s>")
    pair = match_vocabularies(mine, vocabulary(byte_level("sea", 300, ["</s>"]), "</s>", "</s>"))
    return build_model("opt", vocab_size=300, seed=1), build_model("llama", vocab_size=mine.size, seed=2), pair


PAIRS = {"letters": letters, "textbook": textbook, "llama for opt": llama_for_opt}


def plain(core: TargetCore, prompt: list[int], samplings: list[SamplingParams]) -> list[list[int]]:
    """What the target says alone."""
    openings = [
        Open(
            Identity(str(number), 1, 1, 0, len(prompt)),
            tuple(prompt),
            len(prompt),
            frozenset(),
            sampling,
            VerificationMethod.COUPLED,
            NUM_TOKENS,
        )
        for number, sampling in enumerate(samplings)
    ]
    answers = core.handle(1, [*openings, *(Decode(item.identity, NUM_TOKENS) for item in openings)])
    while core.has_work:
        answers += core.step()
    lines: dict[str, list[int]] = {item.identity.session_id: [] for item in openings}
    for _, result in answers:
        assert isinstance(result, Tokens), result
        lines[result.identity.session_id] += result.token_ids
    return list(lines.values())


@pytest.mark.parametrize(
    ("kind", "by_text"), [("greedy", True), ("greedy", False), ("penalised", True), ("coupled", True)]
)
@pytest.mark.parametrize("name", PAIRS)
def test_tokens_are_those_of_plain_decoding(name: str, kind: str, by_text: bool) -> None:
    target, draft, pair = PAIRS[name]()
    prompt = pair.target.encode("the sailors sing")
    samplings = [SamplingParams(**SAMPLINGS[kind], seed=seed) for seed in range(4)]
    verdicts: list[Tokens] = []
    speculative = generate(
        target_core(target, Verifier(), 8, 128),
        draft_core(translated_drafter(draft, pair, by_text), 8, 128),
        prompt,
        samplings,
        VerificationMethod.COUPLED,
        NUM_TOKENS,
        1,
        verdicts.append,
    )
    assert speculative.tolist() == plain(target_core(target, Verifier(), 8, 128), prompt, samplings)
    num_drafted = sum(verdict.num_draft_tokens for verdict in verdicts)
    assert num_drafted >= len(verdicts) * 0.9
    if name == "letters":
        assert sum(verdict.num_accepted_tokens for verdict in verdicts) > 0.75 * num_drafted


def test_behind_a_lookup_in_a_chain_the_tokens_are_those_of_plain_decoding() -> None:
    target, draft, pair = textbook()
    prompt = pair.target.encode("the sea and the sea and the sea")
    samplings = [SamplingParams(temperature=0.4, seed=seed) for seed in range(4)]
    chain = FallbackDrafter([NgramDrafter(ngram_min=2)], translated_drafter(draft, pair))
    cores = target_core(target, Verifier(), 8, 128), draft_core(chain, 8, 128)
    speculative = generate(*cores, prompt, samplings, VerificationMethod.COUPLED, NUM_TOKENS, 1)
    assert speculative.tolist() == plain(target_core(target, Verifier(), 8, 128), prompt, samplings)


class Bench:
    """A draft core over the textbook pair."""

    def __init__(self, *, max_own_len: int = 512) -> None:
        self.target, draft, self.pair = textbook()
        self.drafter = translated_drafter(draft, self.pair)
        self.drafter._max_own_len = max_own_len
        self.core = draft_core(self.drafter, 8, 256)

    def run(self, *items: Open | Propose) -> list[Opened | Proposed]:
        answers = self.core.handle(1, items)
        while self.core.has_work:
            answers += self.core.step()
            self.core.check_integrity()
        return [result for _, result in answers]

    @property
    def own_tokens(self) -> list[int]:
        return next(iter(self.drafter._own.values())).sequence.tokens


def test_after_every_commit_ids_and_cache_are_those_of_the_committed_text() -> None:
    bench = Bench()
    text = bench.pair.target.encode("über the sea and 日本語 the sailors sing 🙂 €, all of them naïve. " * 3)
    prefix, rest = tuple(text[:10]), text[10:]
    sampling = SamplingParams(temperature=1.0, seed=5)
    bench.run(open_item(prefix=prefix, sampling=sampling, max_new_tokens=400))
    at = len(prefix)
    for number, size in enumerate((1, 2, 3, 5, 1, 7, 1, 1, 1, 13, 2, 1, 40, 1, 1, 1)):
        committed = tuple(rest[:size])
        del rest[:size]
        at += size
        bench.run(propose("a", at, committed, 0))
        assert bench.own_tokens == rewrite(bench.pair, text[:at])
        (proposed,) = bench.run(propose("a", at, (), 1 + number % 4))
        assert len(proposed.proposal.token_ids) == 1 + number % 4
        fresh = open_item("b", tuple(text[:at]), attempt=number + 1, sampling=sampling, max_new_tokens=400 - at)
        _, anew = bench.run(fresh, propose("b", at, (), 1 + number % 4, attempt=number + 1))
        assert anew.proposal == proposed.proposal, "the cache is that of the tokens"


def test_a_sequence_too_long_for_the_draft_gets_empty_proposals_and_keeps_no_blocks() -> None:
    bench = Bench(max_own_len=20)
    text = bench.pair.target.encode("the sea and the sailors sing of the sea " * 2)
    opened, proposed = bench.run(open_item(prefix=tuple(text[:4])), propose("a", 4, (), 3))
    assert isinstance(opened, Opened)
    assert proposed.proposal.token_ids
    (proposed,) = bench.run(propose("a", len(text), tuple(text[4:]), 3))
    assert proposed.proposal.token_ids == ()
    assert bench.core.load.num_used_blocks == 0
    opened, proposed = bench.run(open_item("b", tuple(text)), propose("b", len(text), (), 3))
    assert proposed.proposal.token_ids == ()


def test_an_end_of_sequence_is_proposed_as_the_targets() -> None:
    _, draft, pair = textbook()
    with torch.no_grad():  # a draft that ends at once
        head = draft.get_output_embeddings()
        head.weight.zero_()
        draft.transformer.ln_f.bias.fill_(1.0)
        draft.transformer.ln_f.weight.zero_()
        head.weight[0] = 1.0
    for by_text in (True, False):
        core = DraftCore(
            translated_drafter(draft, pair, by_text), max_sequences=2, max_sequence_len=99, max_draft_tokens=8
        )
        answers = core.handle(1, [open_item(eos_token_ids=frozenset({0})), propose("a", 3, (), 4)])
        while core.has_work:
            answers += core.step()
        assert answers[-1][1].proposal.token_ids == (0,)


@pytest.mark.parametrize("by_text", [True, False])
def test_without_finite_logits_a_proposal_ends_and_the_others_go_on(by_text: bool) -> None:
    """A letter's embedding in the draft is not a number."""
    _, draft, pair = letters()
    (bad,), prefix = pair.target.encode("q"), tuple(pair.target.encode("sing"))
    with torch.no_grad():
        draft.get_input_embeddings().weight[pair.draft_id_of[bad]] = torch.nan
    core = draft_core(translated_drafter(draft, pair, by_text), 8, 128)

    def run(name: str, prefix: tuple[int, ...]) -> tuple[int, ...]:
        answers = core.handle(1, [open_item(name, prefix), propose(name, len(prefix), (), 3)])
        while core.has_work:
            answers += core.step()
            core.check_integrity()
        assert [type(result) for _, result in answers] == [Opened, Proposed]
        return answers[-1][1].proposal.token_ids

    alone = run("alone", prefix)
    assert len(alone) == 3
    assert run("broken", (*prefix, bad)) == ()
    assert run("other", prefix) == alone


def test_acceptance_at_start_is_logged_once(caplog) -> None:
    target, draft, pair = letters()
    cores = target_core(target, Verifier(), 64, 128), draft_core(translated_drafter(draft, pair), 64, 128)
    samplings = [SamplingParams(seed=seed) for seed in range(48)]
    with caplog.at_level(logging.INFO, "services.engine.drafters.translated"):
        generate(*cores, [1, 2, 3], samplings, VerificationMethod.COUPLED, 12, 1)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("acceptance at start: ")
    accepted, drafted = (int(word) for word in message.split() if word.isdigit())
    assert drafted >= 256
    assert 0.6 < accepted / drafted <= 1.0
