"""The noise: known answers of the generator, golden vectors of ours, and the argmax drawn from it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine import noise, noise_torch
from services.engine.noise import NoiseKeys, Purpose

torch.set_num_threads(1)

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

GOLDEN_KEYS = NoiseKeys(
    [0, 1, 2**63, 0xDEADBEEFCAFEF00D, 2**64 - 1], [0, 7, 130, 4095, 2**31], [1, 2, 3, 4, 5], [0, 0, 0, 1, 2]
)
GOLDEN_TOKENS = [0, 5, 49151, 128255, 3]
GOLDEN_WORDS = [0x844515E1, 0x3DF4E0CA, 0xFEE7F87C, 0x0252ED9F, 0x38C4D9C2]
GOLDEN_GUMBELS = [0.4150107502937317, -0.34977200627326965, 5.453320026397705, -1.5479696989059448, -0.4095819294452667]

seeds = st.integers(0, 2**64 - 1)


def reference_word(seed: int, index: int, token_id: int, purpose: int, fork: int) -> int:
    """One word in plain integers, written from the paper's definition."""
    left0, right0, left1, right1 = index, token_id // 4, purpose, fork
    key = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * left0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * left1, 2**32)
        left0, right0, left1, right1 = high1 ^ right0 ^ key[0], low1, high0 ^ right1 ^ key[1], low0
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return (left0, right0, left1, right1)[token_id % 4]


def as_tensors(keys: NoiseKeys) -> noise_torch.KeyTensors:
    bits = [np.array(part, dtype=np.uint64).view(np.int64) for part in keys]
    return noise_torch.KeyTensors(*(torch.from_numpy(part) for part in bits))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_generator_gives_the_published_known_answers(counter, key, answer):
    as_array = [np.array(x, dtype=np.uint64) for x in (*counter, *key)]
    assert tuple(int(x) for x in noise.philox(as_array[:4], as_array[4:])) == answer


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_tensor_generator_gives_the_published_known_answers(counter, key, answer):
    as_tensor = [torch.tensor(x) for x in (*counter, *key)]
    assert tuple(int(x) for x in noise_torch.philox(tuple(as_tensor[:4]), tuple(as_tensor[4:]))) == answer


def test_words_and_gumbels_are_the_golden_vectors():
    drawn = noise.words(GOLDEN_KEYS, GOLDEN_TOKENS)
    assert drawn.tolist() == GOLDEN_WORDS
    assert noise.gumbel(drawn).tolist() == GOLDEN_GUMBELS


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(0, 2**32 - 1), st.integers(0, 300_000), st.sampled_from(Purpose), st.integers(0, 2**32 - 1))
def test_a_word_is_that_of_a_plain_integer_reference(seed, index, token_id, purpose, fork):
    drawn = noise.words(NoiseKeys(seed, index, purpose, fork), token_id)
    assert int(drawn) == reference_word(seed, index, token_id, purpose, fork)
    u = (int(drawn) + 0.5) / 2**32
    assert noise.uniform_at(seed, index, purpose, fork, token_id) == u
    assert noise.gumbel_row(seed, index, purpose, [token_id], fork)[0] == np.float32(-math.log(-math.log(u)))


@settings(deadline=None, max_examples=30)
@given(st.lists(seeds, min_size=1, max_size=5), st.integers(1, 70))
def test_tensor_words_and_gumbels_are_bit_identical(many_seeds, vocab_size):
    rows = len(many_seeds)
    keys = NoiseKeys(many_seeds, range(rows), [1 + i % 5 for i in range(rows)], range(rows))
    drawn = noise_torch.words(as_tensors(keys), vocab_size)
    expected = noise.words(NoiseKeys(*(np.array(part, dtype=np.uint64)[:, None] for part in keys)), range(vocab_size))
    assert np.array_equal(drawn.numpy(), expected)
    assert np.array_equal(noise_torch.gumbel(drawn).numpy(), noise.gumbel(expected))


def test_extreme_words_give_finite_gumbels():
    assert noise.gumbel(np.array([0, 2**32 - 1], dtype=np.uint32)) == pytest.approx(
        [-math.log(33 * math.log(2)), 33 * math.log(2)], rel=1e-6
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 300), st.floats(0.0, 12.0), seeds, st.integers(0, 2**32 - 1))
def test_argmax_equals_the_plain_sum_of_scores_and_noise(rows, vocab_size, spread, seed, draw):
    rng = np.random.default_rng(draw)
    scores = (rng.normal(size=(rows, vocab_size)) * spread).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[:, rng.integers(vocab_size)] = 0.0
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    keys = NoiseKeys([seed] * rows, range(rows), [5] * rows, [0] * rows)
    plain = [
        int((scores[r] + noise.gumbel_row(seed, r, Purpose.COUPLED, range(vocab_size))).argmax()) for r in range(rows)
    ]
    assert noise.gumbel_argmax(scores, keys).tolist() == plain
    assert noise_torch.gumbel_argmax(torch.from_numpy(scores), as_tensors(keys)).tolist() == plain
    assert noise_torch.gumbel_argmax_on_device(torch.from_numpy(scores), as_tensors(keys)).tolist() == plain


def test_argmax_does_not_depend_on_the_rows_beside_it():
    scores = np.log(np.random.default_rng(3).dirichlet(np.ones(40_000), size=4)).astype(np.float32)
    keys = NoiseKeys([9, 8, 7, 6], [1, 2, 3, 4], 5)
    alone = [int(noise.gumbel_argmax(scores[r : r + 1], NoiseKeys([9 - r], [1 + r], 5))[0]) for r in range(4)]
    assert noise.gumbel_argmax(scores, keys).tolist() == alone


def test_argmax_of_no_rows_is_empty():
    none = torch.empty(0, 8)
    keys = as_tensors(NoiseKeys([], [], [], []))
    assert noise_torch.gumbel_argmax(none, keys).shape == (0,)
    assert noise_torch.gumbel_argmax_on_device(none, keys).shape == (0,)


def test_every_part_of_the_address_changes_the_word():
    keys = [(1, 2, 3, 4), (2, 2, 3, 4), (1 + 2**32, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]
    drawn = {int(noise.words(NoiseKeys(*key), 8)) for key in keys}
    drawn |= {int(noise.words(NoiseKeys(*keys[0]), token)) for token in (9, 12)}
    assert len(drawn) == 8
