"""Every family of models gives, through the target's core and with n-gram proposals, the tokens of `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.common.items import Proposed, TargetItem, Tokens
from services.draft.core import DraftCore
from services.engine.block_manager import BlockManager
from services.engine.drafters.ngram import NgramDrafter
from services.engine.paged_model import EngineOptions, PagedTargetModel, load_engine
from services.engine.progress import Reporter
from services.engine.verifier import Verifier
from services.target.core import TargetCore
from tests.tiny_models import SUPPORTED_FAMILIES, save_model
from tests.unit.engine.test_paged_model import generated_tokens
from tests.unit.item_builders import decode, open_item, propose, verify

NUM_TOKENS = 48
NUM_DRAFTED = 4
PROMPT = (9, 40, 41, 42, 7, 40, 41, 42, 7, 40, 41)
EOS = frozenset[int]()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def answer(core: TargetCore, *items: TargetItem) -> Tokens:
    """The one answer to `items`."""
    results = core.handle(1, items)
    while core.has_work:
        results += core.step()
        core.check_integrity()
    ((_, tokens),) = results
    assert isinstance(tokens, Tokens), tokens
    return tokens


def drafted(core: DraftCore, base_len: int, commit: tuple[int, ...]) -> tuple[int, ...]:
    results = core.handle(1, [propose("a", base_len, commit, NUM_DRAFTED)])
    while core.has_work:
        results += core.step()
    (proposed,) = (result for _, result in results if isinstance(result, Proposed))
    return proposed.proposal.token_ids


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_tokens_are_those_of_generate(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path, family, sliding_window=9)
    engine = load_engine(EngineOptions(str(model), tmp_path, num_blocks=32, block_size=4), Reporter(quiet=True))
    limits = {"max_sequences": 1, "max_sequence_len": 128, "max_draft_tokens": 8}
    target = TargetCore(PagedTargetModel(engine, Verifier()), BlockManager(32, 4), **limits)
    draft = DraftCore(NgramDrafter(), **limits)
    draft.handle(1, [open_item(prefix=PROMPT, eos_token_ids=EOS)])

    first = open_item(prefix=PROMPT, max_new_tokens=NUM_TOKENS, eos_token_ids=EOS)
    commit = tokens = answer(target, first, decode("a", len(PROMPT), 1)).token_ids
    num_drafted = num_accepted = 0
    while len(tokens) < NUM_TOKENS:
        base_len = len(PROMPT) + len(tokens)
        proposal = drafted(draft, base_len, commit)
        round = answer(target, verify("a", base_len, proposal))
        num_drafted, num_accepted = num_drafted + round.num_draft_tokens, num_accepted + round.num_accepted_tokens
        commit = round.token_ids
        tokens += commit
    assert list(tokens) == generated_tokens(model, list(PROMPT), NUM_TOKENS)
    assert num_drafted > num_accepted, "some proposals were cut"
