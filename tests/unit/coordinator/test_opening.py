from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from services.common.values import TokenOrigin, TopLogProbs
from services.coordinator.opening import replay
from services.coordinator.tokenizer import SimulatedTokenizer
from services.coordinator.trim import EndRules, Trimmed, Trimmer, pack_log_probs


class WatchedTrimmer(Trimmer):
    """Notes the thread it works on."""

    thread: threading.Thread | None = None

    def trim(
        self,
        token_ids: Sequence[int],
        origins: Sequence[TokenOrigin],
        log_probs: Sequence[float] = (),
        top_log_probs: Sequence[TopLogProbs] = (),
    ) -> Trimmed:
        self.thread = threading.current_thread()
        return super().trim(token_ids, origins, log_probs, top_log_probs)


def new_trimmer() -> WatchedTrimmer:
    text = SimulatedTokenizer().text_stream(include_special_tokens=False, context=())
    return WatchedTrimmer(EndRules(frozenset({256}), frozenset(), ("\nUser:",), 40_000), text)


@pytest.mark.parametrize(("num_tokens", "on_the_loop"), [(3, True), (30_000, False)])
async def test_a_replay_gives_what_was_trimmed_before_and_a_long_one_leaves_the_event_loop_alone(
    num_tokens: int, on_the_loop: bool
) -> None:
    token_ids = tuple(97 + i % 26 for i in range(num_tokens))
    origins = [TokenOrigin.DRAFT if i % 3 else TokenOrigin.TARGET for i in range(num_tokens)]
    tops = [TopLogProbs((i, i + 1), (-0.5, -1.5)) for i in token_ids]
    trimmed = new_trimmer().trim(token_ids, origins, [-0.5] * num_tokens, tops)
    trimmer = new_trimmer()
    past = await replay(trimmer, token_ids, trimmed.packed_origins, pack_log_probs(trimmed, 2), 2)
    assert past == trimmed
    assert (trimmer.thread is threading.main_thread()) == on_the_loop
