"""Whether two models share their vocabulary, told from their directories before anything is loaded.

Owns: that comparison, by the digest that coordinator and workers compare too. Must not know: how models are run.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from services.cli.failure import CommandFailed
from services.common.vocab import simulated_vocab, vocab_digest


def digest_of(directory: str) -> str:
    """The vocabulary digest of a model's directory, or of `simulated`. Raises CommandFailed where it is unreadable."""
    if directory == "simulated":
        return vocab_digest(simulated_vocab())
    file = Path(directory) / "tokenizer.json"
    try:
        if stated := _stated(Path(directory)):
            return stated
        return vocab_digest(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True))
    except Exception as error:  # the library raises nothing more specific
        raise CommandFailed(f"cannot read {file}: {error}") from None


def _stated(directory: Path) -> str | None:
    """The digest that a trained draft names, which has no tokenizer of its own; None for any other model."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    return str(config["outrider_draft"]["vocab_digest"]) if "outrider_draft" in config else None


def differ(target: str, draft: str) -> bool:
    """Whether a draft model has to be told of the target's tokenizer. Both are directories, or `simulated`.

    Raises CommandFailed where that would not help: simulated models work with their own kind alone.
    """
    if target == draft or digest_of(target) == digest_of(draft):
        return False
    if "simulated" in (target, draft):
        raise CommandFailed(
            f"the draft {Path(draft).name} and the target {Path(target).name} differ in vocabulary: they cannot work "
            "together; --drafter ngram needs no draft model"
        )
    return True
