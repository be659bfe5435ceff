"""outrider.v1.DraftService: decode, hand to the engine, encode.

Owns: nothing but the translation. Must not know: the drafter.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from outrider.v1 import draft_pb2

from services.common import wire_draft
from services.common.items import DraftItem
from services.common.worker import ItemStream, WorkerState


class DraftServicer:
    """One stream for each coordinator; sequences opened on a stream end with it."""

    def __init__(self, state: WorkerState) -> None:
        self._stream: ItemStream[draft_pb2.DraftStreamRequest, draft_pb2.DraftStreamResponse, DraftItem] = ItemStream(
            state, wire_draft.decode_items, wire_draft.encode_results
        )

    def DraftStream(
        self, requests: AsyncIterator[draft_pb2.DraftStreamRequest], context: object
    ) -> AsyncIterator[draft_pb2.DraftStreamResponse]:
        return self._stream.serve(requests)
