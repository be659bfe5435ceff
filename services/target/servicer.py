"""outrider.v1.TargetService: decode, hand to the engine, encode.

Owns: nothing but the translation. Must not know: the scheduler, the model.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from outrider.v1 import target_pb2

from services.common import wire_target
from services.common.items import TargetItem
from services.common.worker import ItemStream, WorkerState


class TargetServicer:
    """One stream for each coordinator; sequences opened on a stream end with it."""

    def __init__(self, state: WorkerState) -> None:
        self._stream: ItemStream[target_pb2.TargetStreamRequest, target_pb2.TargetStreamResponse, TargetItem] = (
            ItemStream(state, wire_target.decode_items, wire_target.encode_results)
        )

    def TargetStream(
        self, requests: AsyncIterator[target_pb2.TargetStreamRequest], context: object
    ) -> AsyncIterator[target_pb2.TargetStreamResponse]:
        return self._stream.serve(requests)
