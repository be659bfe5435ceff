"""Errors on the wire.

Owns: the only mapping between the exception tree and gRPC status codes. Must not know: what fails where.
"""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.common.errors import ERROR_DOMAIN, ERRORS_BY_CODE, Internal, OutriderError, Unavailable

_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def status_from_error(error: OutriderError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo; plus BadRequest where a field is named, RetryInfo where a retry may help."""
    status = status_pb2.Status(code=error.code, message=error.message)
    metadata = dict(error.metadata, **({"field": error.field} if error.field else {}))
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=metadata)]
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def error_from_rpc(error: grpc.aio.AioRpcError) -> OutriderError:
    """The exception that a server raised, rebuilt from the status; a transport's own failure becomes STREAM_BROKEN."""
    code, text = error.code().value[0], error.details() or error.code().name
    reason, metadata, field, retry_after_ms = "", {}, None, None
    with contextlib.suppress(DecodeError, ValueError):  # details may be undecodable, or another status than the call's
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # only its three accessors are used
        for detail in status.details if status else ():
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
                field = metadata.pop("field", None)
            elif detail.Unpack(retry):
                retry_after_ms = retry.retry_delay.ToMilliseconds()
    if not reason:
        reason = "STREAM_BROKEN" if code == Unavailable.code else error.code().name
    kind = ERRORS_BY_CODE.get(code, Internal)
    return kind(reason, text, field=field, retry_after_ms=retry_after_ms, metadata=metadata)


def code_name(error: OutriderError) -> str:
    """Its status code, as metrics call it."""
    return _CODE_NAMES[error.code]


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: OutriderError) -> None:
    """Ends the call with the error's status. Always raises."""
    status = rpc_status.to_status(status_from_error(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
