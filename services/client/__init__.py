"""The typed async client of Outrider's public interface. It resumes by itself: a caller sees one unbroken stream."""

from services.client.access import Access
from services.client.client import OutriderClient
from services.client.generation import Generation
from services.client.status import ClusterStatus, CoordinatorActivity, WorkerStatus
from services.client.values import (
    Chat,
    ChatMessage,
    Chunk,
    DraftPool,
    GenerateOptions,
    Prompt,
    Result,
    RetryPolicy,
    Round,
    ServedModel,
    SessionRecord,
    Statistics,
    Token,
    TokenIds,
)

__all__ = [
    "Access",
    "Chat",
    "ChatMessage",
    "Chunk",
    "ClusterStatus",
    "CoordinatorActivity",
    "DraftPool",
    "GenerateOptions",
    "Generation",
    "OutriderClient",
    "Prompt",
    "Result",
    "RetryPolicy",
    "Round",
    "ServedModel",
    "SessionRecord",
    "Statistics",
    "Token",
    "TokenIds",
    "WorkerStatus",
]
