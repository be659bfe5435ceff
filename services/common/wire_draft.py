"""DraftStream messages ↔ items and results.

Owns: how a batch of items becomes one message. Must not know: gRPC calls, the engine.
"""

from __future__ import annotations

from collections.abc import Iterable

from outrider.v1 import draft_pb2

from services.common import wire
from services.common.errors import Internal, OutriderError
from services.common.items import Close, DraftItem, DraftResult, Open, Opened, Propose, Proposed, Refused
from services.common.values import Proposal, WorkerLoad


def proposal_to_proto(proposal: Proposal) -> draft_pb2.Proposal:
    message = draft_pb2.Proposal(proposal_id=proposal.proposal_id, token_ids=wire.pack_tokens(proposal.token_ids))
    if proposal.rows is not None:
        message.rows.CopyFrom(wire.proposal_rows_to_proto(proposal.rows))
    return message


def proposal_from_proto(message: draft_pb2.Proposal) -> Proposal:
    token_ids = wire.unpack_tokens(message.token_ids, "proposal.token_ids")
    rows = wire.proposal_rows_from_proto(message.rows, len(token_ids)) if message.HasField("rows") else None
    return Proposal(message.proposal_id, token_ids, rows)


def encode_items(items: Iterable[DraftItem]) -> draft_pb2.DraftStreamRequest:
    request = draft_pb2.DraftStreamRequest()
    features = wire.FeatureBudget()
    for item in items:
        match item:
            case Open():
                request.opens.extend(wire.open_to_proto(item))
            case Propose():
                request.proposes.append(
                    draft_pb2.ProposeItem(
                        identity=wire.identity_to_proto(item.identity),
                        committed_tokens=wire.pack_tokens(item.committed_tokens),
                        num_draft_tokens=item.num_draft_tokens,
                        proposal_id=item.proposal_id,
                        parent_span_id=item.parent_span_id,
                        features=features.take(item.features),
                    )
                )
            case Close():
                request.closes.append(wire.close_to_proto(item))
    return request


def decode_items(
    request: draft_pb2.DraftStreamRequest, opens: wire.OpenAssembler
) -> tuple[list[DraftItem], list[Refused]]:
    """The items in the order opens, proposes, closes; malformed ones as refusals."""
    items: list[DraftItem] = []
    refused: list[Refused] = []
    for message in request.opens:
        try:
            if item := opens.add(message):
                items.append(item)
        except OutriderError as error:
            refused.append(Refused(wire.identity_from_proto(message.identity), error))
    for propose in request.proposes:
        identity = wire.identity_from_proto(propose.identity)
        try:
            committed = wire.unpack_tokens(propose.committed_tokens, "committed_tokens")
            num_draft_tokens, proposal_id = propose.num_draft_tokens, propose.proposal_id
            span_id, features = propose.parent_span_id, propose.features
            items.append(Propose(identity, committed, num_draft_tokens, proposal_id, span_id, features))
        except OutriderError as error:
            refused.append(Refused(identity, error))
    items.extend(wire.close_from_proto(close) for close in request.closes)
    return items, refused


def encode_results(results: Iterable[DraftResult], load: WorkerLoad) -> draft_pb2.DraftStreamResponse:
    response = draft_pb2.DraftStreamResponse(load=wire.load_to_proto(load))
    for result in results:
        message = response.results.add(
            identity=wire.identity_to_proto(result.identity), timings=wire.timings_to_proto(result.timings)
        )
        match result:
            case Opened():
                message.opened.SetInParent()
                message.num_cached_tokens = result.num_cached_tokens
            case Proposed():
                message.proposal.CopyFrom(proposal_to_proto(result.proposal))
                message.num_cached_tokens = result.num_cached_tokens
            case Refused():
                message.error.CopyFrom(wire.error_to_proto(result.error))
    return response


def decode_results(response: draft_pb2.DraftStreamResponse) -> list[DraftResult]:
    """The results in order. A malformed proposal becomes a refusal: a draft is only a hint."""
    return [_decode_result(message) for message in response.results]


def _decode_result(message: draft_pb2.DraftResult) -> DraftResult:
    identity = wire.identity_from_proto(message.identity)
    timings = wire.timings_from_proto(message.timings)
    match message.WhichOneof("outcome"):
        case "opened":
            return Opened(identity, timings, message.num_cached_tokens)
        case "proposal":
            try:
                proposal = proposal_from_proto(message.proposal)
            except OutriderError as error:
                return Refused(identity, error, timings)
            return Proposed(identity, proposal, timings, message.num_cached_tokens)
        case "error":
            return Refused(identity, wire.error_from_proto(message.error), timings)
    return Refused(identity, Internal("DEFECT", "the draft worker sent an empty result"), timings)
