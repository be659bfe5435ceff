"""The verifier against a brute-force reference in plain Python, and its promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import Internal
from services.common.values import SamplingParams, SparseRow, VerificationMethod
from services.engine.noise import Purpose, gumbel_row, uniform_at
from services.engine.processing import Row, process
from services.engine.step import Work
from services.engine.verifier import Verifier
from tests.unit.engine.sampling_builders import TableModel, sequence, work

COUPLED, REJECTION, THRESHOLD = VerificationMethod
VOCAB_SIZE = 8
MODEL = TableModel(VOCAB_SIZE, seed=1)


def scores_at(seq, drafted):
    """Scores of one row, as plain floats."""
    last = [*seq.tokens, *drafted][-1]
    return process(MODEL.table[last][None], [Row(seq, tuple(drafted))])[0].tolist()


def argmax_under_noise(seq, scores, index, purpose):
    noise = gumbel_row(seq.sampling.seed, index, purpose, range(VOCAB_SIZE), seq.fork)
    totals = [float(np.float32(score) + g) for score, g in zip(scores, noise, strict=True)]
    return totals.index(max(totals))


def reference(w: Work, untrusted: bool) -> tuple[list[int], int]:
    """Tokens and accepted count of one work, one position after the other."""
    seq, emitted, num_accepted = w.sequence, [], 0
    method = COUPLED if seq.sampling.greedy else seq.verification
    for place in range(len(w.drafted) + 1):
        if seq.num_remaining_tokens == len(emitted) or (emitted and emitted[-1] in seq.eos_token_ids):
            break
        index, scores = len(seq.tokens) + place, scores_at(seq, emitted)
        x = w.drafted[place] if place < len(w.drafted) else None
        target = [math.exp(score) for score in scores] if not seq.sampling.greedy else []
        if method is COUPLED:
            own = scores.index(max(scores))
            if not seq.sampling.greedy:
                own = argmax_under_noise(seq, scores, index, Purpose.COUPLED)
            accept = x == own
        elif x is None:
            accept, own = False, argmax_under_noise(seq, scores, index, Purpose.TARGET)
        elif method is THRESHOLD:
            accept, own = target[x] > 0.1, argmax_under_noise(seq, scores, index, Purpose.TARGET)
        else:
            row = w.proposal.rows[place] if w.proposal.rows and not untrusted else None
            draft = dict(zip(row.token_ids, row.probs, strict=True)) if row else {x: 1.0}
            u = uniform_at(seq.sampling.seed, index, Purpose.ACCEPT, seq.fork)
            accept = u < target[x] / draft[x]
            left = [max(0.0, t - draft.get(token, 0.0)) for token, t in enumerate(target)]
            left = [math.log(weight) if weight else -math.inf for weight in left]
            own = argmax_under_noise(seq, left if max(left) > -math.inf else scores, index, Purpose.RESIDUAL)
        emitted.append(x if accept else own)
        num_accepted += accept
        if not accept:
            break
    return emitted, num_accepted


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.6, 1.0]),
    top_k=st.sampled_from([0, 0, 3]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    min_tokens=st.sampled_from([0, 2]),
    seed=st.integers(0, 2**64 - 1),
)
tokens = st.integers(0, VOCAB_SIZE - 1)


@st.composite
def works(draw):
    """A sequence of any method with up to 4 drafted tokens, often likely ones, with or without rows."""
    seq = sequence(
        draw(st.lists(tokens, min_size=1, max_size=5)),
        draw(samplings),
        draw(st.sampled_from(VerificationMethod)),
        prompt_len=1,
        eos=frozenset({0}),
        budget=draw(st.sampled_from([1, 3, 50])),
        fork=draw(st.integers(0, 2)),
    )
    drafted, rows = [], []
    for _ in range(draw(st.integers(0, 4))):
        best = int(np.argmax(scores_at(seq, drafted)))
        drafted.append(draw(st.sampled_from([best, best, draw(tokens)])))
        weights = [draw(st.integers(0, 4)) for _ in range(VOCAB_SIZE)]
        weights[drafted[-1]] += 1
        rows.append(SparseRow(tuple(range(VOCAB_SIZE)), tuple(float(np.float32(x / sum(weights))) for x in weights)))
    return work(seq, tuple(drafted), draw(st.sampled_from([None, tuple(rows)])))


@settings(deadline=None, max_examples=200)
@given(st.lists(works(), min_size=1, max_size=5), st.booleans())
def test_verdicts_are_those_of_the_reference(batch, untrusted):
    verdicts = Verifier(untrusted).verify(batch, MODEL.logits(batch))
    assert [(list(v.token_ids), v.num_accepted_tokens) for v in verdicts] == [reference(w, untrusted) for w in batch]


def generate(seq_args, num_tokens, draft, num_drafts):
    """Decodes through the verifier, with `num_drafts(round)` drafted tokens a round out of `draft(tokens)`."""
    seq, verifier, rounds = sequence(**seq_args), Verifier(), 0
    while len(seq.tokens) < num_tokens:
        drafted = []
        for _ in range(num_drafts(rounds)):
            drafted.append(draft([*seq.tokens, *drafted]))
        w = work(seq, tuple(drafted))
        seq.tokens += verifier.verify([w], MODEL.logits([w]))[0].token_ids
        rounds += 1
    return seq.tokens[:num_tokens]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_drafts", [lambda r: 1, lambda r: 5, lambda r: r % 4], ids=["1", "5", "varying"])
@pytest.mark.parametrize(
    "draft", [lambda t: (t[-1] * 3 + 1) % 8, lambda t: int(MODEL.table[t[-1]].argmax()), lambda t: 7]
)
def test_greedy_and_coupled_tokens_do_not_depend_on_the_draft(temperature, num_drafts, draft):
    sampling = SamplingParams(temperature=temperature, presence_penalty=0.7, top_p=0.95, seed=77)
    args = {"tokens": [3], "sampling": sampling}
    plain = generate({"tokens": [3], "sampling": sampling}, 60, draft, lambda r: 0)
    assert generate(args, 60, draft, num_drafts) == plain


@settings(deadline=None, max_examples=30)
@given(st.lists(works(), min_size=2, max_size=5))
def test_a_verdict_does_not_depend_on_the_batch(batch):
    verifier = Verifier()
    together = verifier.verify(batch, MODEL.logits(batch))
    assert [verifier.verify([w], MODEL.logits([w]))[0] for w in batch] == together


def test_works_without_rows_have_no_verdict():
    prefill, decode = Work(sequence([1, 2]), num_new_tokens=2), work(sequence([3]))
    verdicts = Verifier().verify([prefill, decode, prefill], MODEL.logits([prefill, decode, prefill]))
    assert [v is None for v in verdicts] == [True, False, True]


def test_a_step_of_prefill_alone_has_no_verdicts():
    assert Verifier().verify([Work(sequence([1, 2]), num_new_tokens=2)], torch.empty(0, 8)) == [None]


def test_the_very_draw_of_a_bonus_token_is_that_of_plain_decoding():
    seq = sequence([2], SamplingParams(seed=5), REJECTION)
    certain = torch.full((2, VOCAB_SIZE), -1e4)
    certain[0, 3] = 0.0
    certain[1] = MODEL.table[3]
    verdict = Verifier().verify([work(seq, (3,))], certain)[0]
    alone = Verifier().verify([work(sequence([2, 3], seq.sampling, REJECTION))], MODEL.table[3][None])[0]
    assert verdict.token_ids == (3, *alone.token_ids)


def test_an_invalid_row_is_flagged_on_its_sequence_alone():
    bad = (SparseRow((1,), (0.5,)),)
    batch = [
        work(sequence([1], verification=REJECTION), (1,), rows) for rows in (bad, None, (SparseRow((1,), (1.0,)),))
    ]
    assert [v.rows_replaced for v in Verifier().verify(batch, MODEL.logits(batch))] == [True, False, False]


def test_fewer_rows_than_tokens_are_flagged_as_missing():
    batch = [work(sequence([1], verification=REJECTION), (1, 2), (SparseRow((1,), (1.0,)),))]
    assert Verifier().verify(batch, MODEL.logits(batch))[0].rows_replaced


def test_a_lying_row_is_not_looked_at_when_drafts_are_untrusted():
    lie = (SparseRow((1,), (0.5,)),)
    batch = [work(sequence([1], verification=REJECTION), (1,), lie)]
    assert not Verifier(untrusted_drafts=True).verify(batch, MODEL.logits(batch))[0].rows_replaced


@pytest.mark.parametrize("bad", [VOCAB_SIZE, -1])
def test_a_proposal_ends_before_an_id_outside_the_vocabulary(bad):
    seq = sequence([2], SamplingParams(temperature=0.0))
    best = int(MODEL.table[2].argmax())
    logits = torch.cat([MODEL.table[[2, best]], torch.randn(2, VOCAB_SIZE)])
    verdict = Verifier().verify([work(seq, (best, bad, 1))], logits)[0]
    assert verdict.token_ids == (best, int(MODEL.table[best].argmax()))
    assert verdict.num_accepted_tokens == 1


def test_log_probs_are_of_the_raw_logits_whatever_the_processing():
    sampling = SamplingParams(temperature=0.3, top_k=2, logit_bias=((4, 9.0),), seed=3)
    asking = sequence([1], sampling, log_probs=True, num_top_log_probs=3)
    silent = sequence([5], sampling)
    batch = [work(silent, (2,)), work(asking, (4, 4)), work(silent)]
    quiet, verdict, _ = Verifier().verify(batch, MODEL.logits(batch))
    assert (quiet.log_probs, quiet.top_log_probs) == ((), ())
    assert len(verdict.log_probs) == len(verdict.top_log_probs) == len(verdict.token_ids)
    before = [1, *verdict.token_ids]
    for place, token in enumerate(verdict.token_ids):
        raw = torch.log_softmax(MODEL.table[before[place]], dim=0)
        assert verdict.log_probs[place] == pytest.approx(raw[token].item(), abs=1e-6)
        top = raw.topk(3)
        assert verdict.top_log_probs[place].token_ids == tuple(top.indices.tolist())
        assert verdict.top_log_probs[place].log_probs == pytest.approx(top.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", VerificationMethod)
def test_logits_that_are_not_finite_are_an_error_of_their_sequence_alone(value, method):
    sampling = SamplingParams(temperature=0.8, top_p=0.9, seed=3)
    batch = [work(sequence([n], sampling, method), (2, 5)) for n in range(3)]
    logits = MODEL.logits(batch)
    expected = Verifier().verify(batch, logits)
    logits[4, 5] = value
    first, error, last = Verifier().verify(batch, logits)
    assert [first, last] == [expected[0], expected[2]]
    assert isinstance(error, Internal)
    assert "not finite: session session" in str(error)


def test_a_wrong_number_of_rows_is_refused():
    with pytest.raises(Internal, match="3 rows of logits, 2 were asked for"):
        Verifier().verify([work(sequence([0]), (1,))], MODEL.table[:3])


GOLDEN_TOKENS = {
    COUPLED: [(5,), (0,), (6,), (6,), (1, 7), (5,), (0,), (0,)],
    REJECTION: [(7,), (7,), (7,), (6,), (3,), (5,), (0,), (0,)],
    THRESHOLD: [(1, 2), (1, 2), (7,), (6,), (1, 2), (7,), (1, 2), (0,)],
}


@pytest.mark.parametrize("method", VerificationMethod)
def test_tokens_are_the_golden_ones(method):
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=0x0123456789ABCDEF)
    batch = [work(sequence([token], sampling, method), (1, 2, 3)) for token in range(VOCAB_SIZE)]
    assert [v.token_ids for v in Verifier().verify(batch, MODEL.logits(batch))] == GOLDEN_TOKENS[method]
