"""What transformers tells by bars of its own while it reads a model, passed on to the reporter's one.

Owns: where transformers makes those bars. Must not know: how progress is shown. Where a version of transformers makes
them elsewhere, the reporter's bar stays without a total.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import TypeVar

import transformers

from services.engine.progress import Advance

T = TypeVar("T")


@contextlib.contextmanager
def loading_bars(advance: Advance, stages: dict[ModuleType, str]) -> Iterator[None]:
    """While the block runs, `advance` hears of each tensor that one of these modules takes up, as a stage of that name,
    and transformers draws nothing. Not for several threads at once."""

    def counted(stage: str, items: Collection[T]) -> Iterator[T]:
        for done, item in enumerate(items):
            advance(done, total=len(items), stage=stage)
            yield item
        advance(len(items), total=len(items), stage=stage)

    with contextlib.ExitStack() as stack:
        logging = transformers.utils.logging
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            stack.callback(logging.enable_progress_bar)
        for module, stage in stages.items():
            if (bar := getattr(module, "tqdm", None)) is not None:
                stack.callback(setattr, module, "tqdm", bar)
                setattr(module, "tqdm", lambda items, *_, stage=stage, **__: counted(stage, items))  # noqa: B010
        yield
