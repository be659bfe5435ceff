"""Defects that break exactness or lose tokens, each as changes of the source and the tests that must notice.

Owns: the list. Must not know: how a mutant is applied and judged.
"""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """Replaces `before`, which stands exactly once in the file at `path`, by `after`."""

    path: str
    before: str
    after: str


class Mutant(NamedTuple):
    """One defect. Each of `tests`, pytest's node ids, must fail on its own."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


_VERIFIER = "tests/unit/engine/test_verifier.py::test_verdicts_are_those_of_the_reference"
_CHAINS = "tests/distribution/test_chains.py::"
_JOINT = _CHAINS + "test_first_tokens_have_the_targets_joint_distribution"
_ENGINE = "tests/distribution/test_engine.py::test_generated_tokens_have_the_targets_joint_distribution"
_CHOOSING = "services/engine/choosing.py"
_SAMPLER = "services/engine/sampler.py"

MUTANTS = (
    Mutant(
        "residual replaced by the target",
        (
            Edit(
                _CHOOSING,
                "remaining = acceptance.residual(ends, rows.token_ids[at], rows.probs[at])",
                "remaining = ends",
            ),
        ),
        (_VERIFIER, f"{_JOINT}[good-all-8-rejection]"),
    ),
    # Given that the token is of the row, it has the row's distribution; else the target takes it for a point mass. So
    # the output stays exact, at a loss of acceptance: what the tests see is a token outside its row.
    Mutant(
        "draft samples from the full distribution but sends its top-k",
        (
            Edit(
                _SAMPLER,
                "row_ids.astype(np.int64), row_probs.astype(np.float32))",
                "np.tile(np.arange(scores.shape[1]), (len(drawn), 1)), scores[torch.from_numpy(drawn)].exp().numpy())",
            ),
        ),
        (
            "tests/unit/engine/test_sampler.py::test_a_rejection_token_is_always_one_of_its_own_row",
            _CHAINS + "test_rows_shorter_than_the_vocabulary_keep_the_distribution",
        ),
    ),
    Mutant(
        "a sampled token withheld for its low probability",
        (
            Edit(
                "services/engine/drafters/model.py",
                "            if sampled is not None:\n",
                "            if sampled and sampled.row and dict(zip(*sampled.row))[sampled.token_id] < 0.2:\n"
                "                draft.end()\n"
                "            elif sampled is not None:\n",
            ),
        ),
        (f"{_ENGINE}[engine-identical-top_k-8-rejection]",),
    ),
    Mutant(
        "the end of a proposal decided on the sampled token",
        (
            Edit(
                _SAMPLER,
                "None if end else Sampled(*found)",
                "None if end or (found[1] and dict(zip(*found[1]))[found[0]] < self._min_prob) else Sampled(*found)",
            ),
        ),
        (
            "tests/unit/engine/test_sampler.py::test_whether_a_row_ends_the_proposal_depends_on_the_row_alone[VerificationMethod.REJECTION]",
            f"{_ENGINE}[engine-uncertain-top_k-8-rejection]",
        ),
    ),
    Mutant(
        "one noise for draft and acceptance",
        (
            Edit(
                "services/common/values.py",
                'return int.from_bytes(digest[:8], "little")',
                "return seed if digest else 0",
            ),
            Edit(_CHOOSING, "batch.indices[:, :width], Purpose.ACCEPT,", "batch.indices[:, :width], Purpose.DRAFT,"),
            Edit(_CHOOSING, "noise.words(keys, 0)", "noise.words(keys, batch.drafted)"),
        ),
        (_VERIFIER, f"{_JOINT}[good-all-8-rejection]"),
    ),
    Mutant(
        "penalties not advanced over the draft",
        (Edit("services/engine/processing.py", "        if row.drafted:\n", "        if row.drafted and False:\n"),),
        (
            "tests/unit/engine/test_processing.py::test_penalties_count_each_drafted_token_from_its_own_row_on",
            f"{_JOINT}[good-penalties-16-rejection]",
        ),
    ),
    Mutant(
        "the bonus token unprocessed",
        (
            Edit(
                "services/engine/verifier.py",
                "process(logits, rows_of(asking))",
                "process(logits, rows_of(asking)).index_copy(\n"
                "    0,\n"
                "    torch.from_numpy(batch.first_rows + batch.lens),\n"
                "    torch.log_softmax(logits[batch.first_rows + batch.lens], dim=1),\n"
                ")",
            ),
        ),
        (_VERIFIER, f"{_JOINT}[good-top_p-16-rejection]"),
    ),
    Mutant(
        "a staged draft sends the rows of the tokens behind",
        (Edit("services/engine/draft_verifier.py", "tuple(own[: len(kept)])", "tuple(own[1 : len(kept) + 1])"),),
        (
            "tests/unit/engine/test_draft_verifier.py"
            "::test_every_token_comes_with_the_row_that_the_draft_would_have_sampled_it_from",
            f"{_ENGINE}[engine-staged-penalties-8-rejection]",
        ),
    ),
    # The chaos test notices these two as well: `make check-chaos-mutants`.
    Mutant(
        "emit before persist",
        (
            Edit(
                "services/coordinator/journal.py",
                "        self._unreleased.append((len(self._copy), release))\n",
                "        release()\n",
            ),
        ),
        (
            "tests/unit/coordinator/test_committer.py::test_tokens_go_out_in_order_and_only_when_stored",
            "tests/integration/coordinator/test_store_outage.py::test_no_token_goes_out_before_its_acknowledgement",
        ),
    ),
    Mutant(
        "compare-and-set without the epoch",
        (
            Edit(
                "services/common/session_scripts.py",
                "if stored[2] ~= ARGV[1] or stored[3] ~= ARGV[2] then",
                "if stored[2] ~= ARGV[1] then",
            ),
        ),
        ("tests/integration/common/test_session_store.py::test_the_same_owner_with_an_older_epoch_is_refused",),
    ),
)
