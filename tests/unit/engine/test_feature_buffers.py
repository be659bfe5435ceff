"""Features keep their addresses, so that a recorded step fills and reads them when it is replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from services.engine.feature_input import MAX_ROWS, FeatureInput, join
from services.engine.feature_tap import FeatureTap

WIDTH, HIDDEN, VOCAB = 4, 4, 10


class Recording(TorchDispatchMode):
    """As a CUDA graph: notes the operators and the tensors that they ran on; a replay runs these, and no Python."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            found = func(*args, **kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(found)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def record(function: Callable[[], Any]) -> tuple[Any, Recording]:
    function()  # the warm-up that takes buffers
    with Recording() as recording:
        result = function()
    return result, recording


class Headed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(HIDDEN, VOCAB)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


@torch.inference_mode()
def test_a_tap_is_filled_by_the_replay_of_a_step() -> None:
    module = Headed()
    tap = FeatureTap(module, num_buffered=6)
    hidden = torch.randn(1, 5, HIDDEN)
    _, recording = record(lambda: module.head(hidden))
    hidden.normal_()
    recording.replay()
    assert torch.equal(tap.rows(5), hidden[0])
    assert torch.equal(tap.rows(3), hidden[0, :3])


@torch.inference_mode()
@pytest.mark.parametrize("num_buffered", [0, 4])
def test_a_tap_keeps_the_rows_of_the_last_step_however_many(num_buffered: int) -> None:
    module = Headed()
    tap = FeatureTap(module, num_buffered)
    with pytest.raises(RuntimeError, match="no step"):
        tap.rows(1)
    for num_rows in (3, 9, 4, 1, 12):
        hidden = torch.randn(1, num_rows, HIDDEN)
        module.head(hidden)
        assert torch.equal(tap.rows(num_rows), hidden[0])


@torch.inference_mode()
def test_inputs_take_the_features_of_the_moment_when_a_step_is_replayed() -> None:
    table, projection = torch.randn(VOCAB, WIDTH), torch.randn(WIDTH, HIDDEN)
    taking = FeatureInput(table, projection)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    inputs, recording = record(lambda: taking(ids))
    told = torch.randn(2, HIDDEN)
    for features in (told, told[:1], told[:0], -told):
        taking.put(5, [4, 1][: len(features)], list(features))
        ids.copy_(ids.flip(1))
        recording.replay()
        rows = torch.zeros(5, HIDDEN)
        rows[[4, 1][: len(features)]] = features
        torch.testing.assert_close(inputs[0], join(table[ids[0]], rows, projection))
        assert len(features) or torch.equal(inputs[0], table[ids[0]])


@torch.inference_mode()
def test_tokens_behind_the_buffer_go_without_features() -> None:
    table, projection = torch.randn(VOCAB, WIDTH), torch.randn(WIDTH, HIDDEN)
    taking = FeatureInput(table, projection)
    ids = torch.zeros(1, MAX_ROWS + 2, dtype=torch.int64)
    taking.put(MAX_ROWS + 2, [MAX_ROWS - 1, MAX_ROWS + 1], list(torch.ones(2, HIDDEN)))
    inputs = taking(ids)[0]
    assert not torch.equal(inputs[MAX_ROWS - 1], table[0])
    assert torch.equal(inputs[MAX_ROWS:], table[:1].expand(2, WIDTH))
