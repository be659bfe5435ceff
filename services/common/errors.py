"""The exception tree. One interceptor maps it to gRPC status codes and google.rpc.ErrorInfo; nothing else does.

    OutriderError                         code, reason, retry_after_ms, metadata
    ├── InvalidArgument                   INVALID_PARAMETER, PROMPT_TOO_LONG, REQUEST_MISMATCH, UNDECODABLE
    ├── NotFound                          UNKNOWN_SESSION, UNKNOWN_MODEL
    ├── FailedPrecondition                VOCAB_MISMATCH, MODEL_MISMATCH, MODEL_CHANGED, SESSION_CLOSED, UNSUPPORTED
    ├── Aborted                           STALE, OWNERSHIP_LOST, SESSION_BUSY, SLOW_CLIENT, UNKNOWN_SEQUENCE
    ├── PermissionDenied                  WRONG_PEER
    ├── ResourceExhausted                 QUEUE_FULL, KV_POOL_FULL, RATE_LIMITED, TOO_MANY_SESSIONS,
    │                                     TOO_MANY_CALLS (retriable),
    │                                     TOO_LONG_FOR_POOL, SESSION_LIMIT, TOKEN_LIMIT (not)
    ├── Unavailable                       STARTING, DRAINING, MOVED, STORE_UNAVAILABLE, NO_TARGET, NO_DRAFT,
    │                                     STREAM_BROKEN
    ├── DeadlineExceeded                  DEADLINE, NO_MESSAGE
    ├── Unauthenticated                   BAD_CREDENTIALS
    ├── DataLoss                          TOKENS_LOST
    └── Internal                          DEFECT; the detail is in the log

    ConfigError                           a setting that stops the start; never crosses the wire
    ModelUnsupported                      a model the engine refuses at load; never crosses the wire
    WorkerFailed                          a worker that cannot go on and ends; never crosses the wire

Owns: codes and reasons. Must not know: grpc (codes are those of google.rpc.Code, as plain numbers).
"""

from __future__ import annotations

from typing import ClassVar

ERROR_DOMAIN = "outrider"
NEWEST_EPOCH = "newest_lease_epoch"
"""In the metadata of a worker's STALE: the epoch that it knows, where that is newer than the item's."""


class OutriderError(Exception):
    """An error with a code for the protocol, a reason for programs and a sentence for people."""

    code: ClassVar[int] = 13

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        field: str | None = None,
        retry_after_ms: int | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms
        self.metadata = dict(metadata or {})

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.reason, self.message, self.field, self.retry_after_ms, self.metadata))


def _rebuild(
    kind: type[OutriderError], reason: str, message: str, field: str | None, retry: int | None, metadata: dict[str, str]
) -> OutriderError:
    return kind(reason, message, field=field, retry_after_ms=retry, metadata=metadata)


class InvalidArgument(OutriderError):
    code = 3


class DeadlineExceeded(OutriderError):
    code = 4


class NotFound(OutriderError):
    code = 5


class PermissionDenied(OutriderError):
    code = 7


class ResourceExhausted(OutriderError):
    code = 8


class FailedPrecondition(OutriderError):
    code = 9


class Aborted(OutriderError):
    code = 10


class Internal(OutriderError):
    code = 13


class Unavailable(OutriderError):
    code = 14


class DataLoss(OutriderError):
    code = 15


class Unauthenticated(OutriderError):
    code = 16


ERRORS_BY_CODE: dict[int, type[OutriderError]] = {
    kind.code: kind
    for kind in (
        InvalidArgument,
        DeadlineExceeded,
        NotFound,
        PermissionDenied,
        ResourceExhausted,
        FailedPrecondition,
        Aborted,
        Internal,
        Unavailable,
        DataLoss,
        Unauthenticated,
    )
}


class ConfigError(Exception):
    """A setting is unknown, unparsable or contradictory; the message names it."""


class ModelUnsupported(Exception):
    """The engine cannot run a model exactly; the message says why."""


class WorkerFailed(Exception):
    """A worker lost what it cannot go on without: its engine thread, or a rank of its model. Its process ends."""
