"""The names of drafters, and chains of them.

Owns: which there are and how they combine. Must not know: how any of them drafts.
"""

from __future__ import annotations

from services.common.errors import ConfigError

LOOKUPS = ("ngram", "suffix")
"""Copy from earlier tokens; need no weights."""
MODELS = ("model", "features", "mtp", "staged")
"""Run a language model."""
DRAFTERS = (*LOOKUPS, *MODELS, "simulated")
DRAFTER_HELP = f"{', '.join(DRAFTERS)}; or a chain as suffix,model: lookups, then one that proposes where none matches"


def parse_chain(text: str) -> tuple[str, ...]:
    """The drafters that `text` names, in the order they are asked.

    Raises ConfigError for an unknown or repeated one, and for one behind another that always has a proposal.
    """
    chain = tuple(name.strip() for name in text.split(","))
    for name in chain:
        if name not in DRAFTERS:
            raise ConfigError(
                f"drafter: {name!r} is not one of {', '.join(DRAFTERS)}, or a chain of them as suffix,model"
            )
        if chain.count(name) > 1:
            raise ConfigError(f"drafter: {name} stands twice in {text!r}")
    for name in chain[:-1]:
        if name not in LOOKUPS:
            raise ConfigError(
                f"drafter: {name} always has a proposal, so nothing can stand behind it in {text!r}; only "
                f"{' and '.join(LOOKUPS)} leave proposals to the next"
            )
    return chain


def needs_model(chain: tuple[str, ...]) -> bool:
    """Whether the chain runs the model that the settings name."""
    return any(name in MODELS for name in chain)
