"""Which combinations of drafter, processing, vocabulary and method are drawn from: all, and a pairwise cover."""

from __future__ import annotations

import itertools

from services.common.values import VerificationMethod
from tests.distribution.chains import DRAFTERS, PROCESSING, Case

VOCAB_SIZES = (8, 16)

ALL = [
    *(Case(*part, VerificationMethod.REJECTION) for part in itertools.product(DRAFTERS, PROCESSING, VOCAB_SIZES)),
    # What is drawn doesn't depend on the drafter here, which a test of its own shows.
    *(Case("good", *part, VerificationMethod.COUPLED) for part in itertools.product(PROCESSING, VOCAB_SIZES)),
]

# Every drafter with every processing; the vocabularies alternate, so that each meets every drafter and processing.
PAIRWISE = [
    *(
        Case(drafter, processing, VOCAB_SIZES[(i + j) % 2], VerificationMethod.REJECTION)
        for i, drafter in enumerate(DRAFTERS)
        for j, processing in enumerate(name for name in PROCESSING if name != "plain")
    ),
    Case("good", "all", 8, VerificationMethod.COUPLED),
    Case("bad", "penalties", 16, VerificationMethod.COUPLED),
]
