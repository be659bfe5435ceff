"""TargetStream messages ↔ items and results.

Owns: how a batch of items becomes one message. Must not know: gRPC calls, the engine.
"""

from __future__ import annotations

from collections.abc import Iterable

from outrider.v1 import target_pb2

from services.common import wire
from services.common.errors import Internal, OutriderError
from services.common.items import Close, Decode, Open, Refused, TargetItem, TargetResult, Tokens, Verify
from services.common.values import WorkerLoad
from services.common.wire_draft import proposal_from_proto, proposal_to_proto


def encode_items(items: Iterable[TargetItem]) -> target_pb2.TargetStreamRequest:
    request = target_pb2.TargetStreamRequest()
    for item in items:
        match item:
            case Open():
                request.opens.extend(wire.open_to_proto(item))
            case Verify():
                request.verifies.append(
                    target_pb2.VerifyItem(
                        identity=wire.identity_to_proto(item.identity),
                        proposal=proposal_to_proto(item.proposal),
                        parent_span_id=item.parent_span_id,
                    )
                )
            case Decode():
                request.decodes.append(
                    target_pb2.DecodeItem(
                        identity=wire.identity_to_proto(item.identity),
                        num_free_tokens=item.num_free_tokens,
                        parent_span_id=item.parent_span_id,
                    )
                )
            case Close():
                request.closes.append(wire.close_to_proto(item))
    return request


def decode_items(
    request: target_pb2.TargetStreamRequest, opens: wire.OpenAssembler
) -> tuple[list[TargetItem], list[Refused]]:
    """The items in the order opens, verifies, decodes, closes; malformed ones as refusals."""
    items: list[TargetItem] = []
    refused: list[Refused] = []
    for message in request.opens:
        try:
            if item := opens.add(message):
                items.append(item)
        except OutriderError as error:
            refused.append(Refused(wire.identity_from_proto(message.identity), error))
    for verify in request.verifies:
        identity = wire.identity_from_proto(verify.identity)
        try:
            items.append(Verify(identity, proposal_from_proto(verify.proposal), verify.parent_span_id))
        except OutriderError as error:
            refused.append(Refused(identity, error))
    for decode in request.decodes:
        identity = wire.identity_from_proto(decode.identity)
        items.append(Decode(identity, decode.num_free_tokens, decode.parent_span_id))
    items.extend(wire.close_from_proto(close) for close in request.closes)
    return items, refused


def encode_results(results: Iterable[TargetResult], load: WorkerLoad) -> target_pb2.TargetStreamResponse:
    response = target_pb2.TargetStreamResponse(load=wire.load_to_proto(load))
    features = wire.FeatureBudget()
    for result in results:
        message = response.results.add(
            identity=wire.identity_to_proto(result.identity), timings=wire.timings_to_proto(result.timings)
        )
        match result:
            case Tokens():
                _fill_tokens(message, result)
                message.tokens.features = features.take(result.features)
            case Refused():
                message.error.CopyFrom(wire.error_to_proto(result.error))
    return response


def _fill_tokens(message: target_pb2.TargetResult, result: Tokens) -> None:
    message.num_cached_tokens = result.num_cached_tokens
    message.step_ns = result.step_ns
    message.step_rows = result.step_rows
    tokens = message.tokens
    tokens.token_ids = wire.pack_tokens(result.token_ids)
    tokens.num_accepted_tokens = result.num_accepted_tokens
    tokens.num_draft_tokens = result.num_draft_tokens
    tokens.done = result.done
    tokens.rows_replaced = result.rows_replaced
    if result.log_probs:
        tokens.log_probs = wire.pack_floats(result.log_probs)
    if result.top_log_probs:
        tokens.top_token_ids, tokens.top_log_probs = wire.top_log_probs_to_bytes(result.top_log_probs)


def decode_results(response: target_pb2.TargetStreamResponse) -> list[TargetResult]:
    """The results in order. Raises InvalidArgument if the target breaks the protocol."""
    return [_decode_result(message) for message in response.results]


def _decode_result(message: target_pb2.TargetResult) -> TargetResult:
    identity = wire.identity_from_proto(message.identity)
    timings = wire.timings_from_proto(message.timings)
    match message.WhichOneof("outcome"):
        case "tokens":
            tokens = message.tokens
            token_ids = wire.unpack_tokens(tokens.token_ids)
            return Tokens(
                identity=identity,
                token_ids=token_ids,
                num_accepted_tokens=tokens.num_accepted_tokens,
                num_draft_tokens=tokens.num_draft_tokens,
                done=tokens.done,
                log_probs=wire.unpack_floats(tokens.log_probs, "log_probs"),
                top_log_probs=wire.top_log_probs_from_bytes(tokens.top_token_ids, tokens.top_log_probs, len(token_ids)),
                rows_replaced=tokens.rows_replaced,
                timings=timings,
                num_cached_tokens=message.num_cached_tokens,
                step_ns=message.step_ns,
                step_rows=message.step_rows,
                features=tokens.features,
            )
        case "error":
            return Refused(identity, wire.error_from_proto(message.error), timings)
    return Refused(identity, Internal("DEFECT", "the target worker sent an empty result"), timings)
