"""Which cases a sweep makes."""

from __future__ import annotations

import click
import pytest

from services.cli.bench.options import Chains, Names
from services.cli.bench.sweep import Case, Sweep
from services.client import GenerateOptions
from services.common.values import VerificationMethod

COUPLED, REJECTION = VerificationMethod.COUPLED, VerificationMethod.REJECTION


def test_without_a_sweep_there_is_the_one_case_of_the_options():
    options = GenerateOptions(temperature=0.5, num_draft_tokens=3, verification=REJECTION)
    assert Sweep().cases("ngram", options) == (Case("ngram", 3, 0.5, REJECTION),)


def test_all_combinations_grouped_by_drafter():
    sweep = Sweep((1, 2), ("ngram", "model"), ("greedy", "rejection"))
    cases = sweep.cases("ngram", GenerateOptions(temperature=0.0))
    assert len(cases) == 8
    assert [case.drafter for case in cases] == ["ngram"] * 4 + ["model"] * 4
    assert [(case.temperature, case.num_draft_tokens) for case in cases[:4]] == [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2)]
    assert cases[2].verification is REJECTION


def test_a_sampling_has_the_temperature_given():
    (case,) = Sweep(samplings=("coupled",)).cases("ngram", GenerateOptions(temperature=0.7))
    assert (case.temperature, case.verification) == (0.7, COUPLED)
    assert case.label == "ngram, coupled at 0.7"


def test_case_options_keep_the_rest():
    base = GenerateOptions(max_tokens=7, temperature=0.0)
    options = Case("ngram", 2, 1.0, REJECTION).options(base)
    assert (options.max_tokens, options.num_draft_tokens, options.temperature) == (7, 2, 1.0)


def test_lists_name_what_is_unknown_and_drop_repetitions():
    kind = Names(("a", "b"))
    assert kind.convert("b, a,b", None, None) == ("b", "a")
    with pytest.raises(click.BadParameter, match="'c' is not one of a, b"):
        kind.convert("a,c", None, None)


def test_drafters_of_a_sweep_may_be_chains():
    assert Chains().convert("ngram,suffix+model,ngram", None, None) == ("ngram", "suffix,model")
    with pytest.raises(click.BadParameter, match="nothing can stand behind it"):
        Chains().convert("ngram,model+suffix", None, None)
