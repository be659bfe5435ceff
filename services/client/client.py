"""OutriderClient: what programs call.

Owns: the life of the connections, and identities drawn for a generation.
Must not know: how a stream is read or resumed.

    async with OutriderClient("127.0.0.1:50051") as client:
        async for chunk in client.generate(Chat.of("Hello"), GenerateOptions(max_tokens=64)):
            print(chunk.text, end="")
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import grpc.aio
from outrider.v1 import coordinator_pb2

from services.client.access import Access
from services.client.connections import Connection, Connections, another_may_answer
from services.client.generation import Generation
from services.client.status import ClusterStatus, status_from_proto
from services.client.values import GenerateOptions, Prompt, Result, RetryPolicy, ServedModel, SessionRecord
from services.client.wire import model_from_proto, request_to_proto, session_from_proto
from services.common.errors import OutriderError, Unavailable
from services.common.rpc_errors import error_from_rpc

T = TypeVar("T")
_UNARY_TIMEOUT_S = 10.0


class OutriderClient:
    """A client of one or several interchangeable coordinators. Async context manager; one event loop."""

    def __init__(self, *addresses: str, retry: RetryPolicy | None = None, access: Access | None = None) -> None:
        """`addresses` are host:port, or names of several coordinators such as dns:///name:port; sessions spread
        over all of them. Connects when first used; in plaintext and without an API key unless `access` says
        otherwise. Raises ValueError without an address, ConfigError for an `access` that cannot be used."""
        self._connections = Connections(addresses, access)
        self._retry = retry or RetryPolicy()

    async def __aenter__(self) -> OutriderClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; running generations end."""
        await self._connections.close()

    def generate(
        self,
        prompt: Prompt | None,
        options: GenerateOptions | None = None,
        *,
        session_id: str | None = None,
        request_id: str | None = None,
        fork: bool = False,
        fork_len: int | None = None,
    ) -> Generation:
        """Starts a generation when iterated over; see Generation.

        `session_id` and `request_id` are UUIDs, drawn if absent. A session that has tokens takes the prompt as its next
        turn. The same request_id with equal options and a given seed resumes that generation, or repeats it if it has
        finished.
        `fork`: generate in a new session, a copy of the given one or of its first `fork_len` tokens; the given one goes
        on untouched, even while it is busy. Without a prompt the copy is continued. The new session's id is that of the
        generation once its stream has begun.
        Raises InvalidArgument at once for values that cannot be encoded.
        """
        options = options or GenerateOptions()
        request = request_to_proto(
            prompt,
            options,
            session_id=session_id or str(uuid.uuid4()),
            request_id=request_id or str(uuid.uuid4()),
            seed=secrets.randbits(64) if options.seed is None else options.seed,
            fork=fork,
            fork_len=fork_len,
        )
        return Generation(self._connections, request, self._retry)

    async def complete(
        self, prompt: Prompt, options: GenerateOptions | None = None, *, session_id: str | None = None
    ) -> Result:
        """Generates and returns the whole result."""
        return await self.generate(prompt, options, session_id=session_id).complete()

    async def get_session(self, session_id: str) -> SessionRecord:
        """Raises NotFound for an unknown session."""
        request = coordinator_pb2.GetSessionRequest(session_id=session_id)
        return session_from_proto(await self._call(lambda stub, **how: stub.GetSession(request, **how), session_id))

    async def close_session(self, session_id: str) -> None:
        """Ends a session and frees what it holds. Raises NotFound for an unknown session."""
        request = coordinator_pb2.CloseSessionRequest(session_id=session_id)
        await self._call(lambda stub, **how: stub.CloseSession(request, **how), session_id)

    async def list_models(self) -> tuple[ServedModel, ...]:
        """The models that requests may name, in order of their names."""
        request = coordinator_pb2.ListModelsRequest()
        response = await self._call(lambda stub, **how: stub.ListModels(request, **how))
        return tuple(model_from_proto(model) for model in response.models)

    async def get_cluster_status(self) -> ClusterStatus:
        """How the coordinator and its workers are doing."""
        request = coordinator_pb2.GetClusterStatusRequest()
        return status_from_proto(await self._call(lambda stub, **how: stub.GetClusterStatus(request, **how)))

    async def _call(self, call: Callable[..., grpc.aio.UnaryUnaryCall[Any, T]], session_id: str = "") -> T:
        """Tries each address once; only those that do not answer are passed over."""
        failure: OutriderError | None = None
        connection: Connection | None = None
        for _ in range(len(self._connections)):
            connection = self._connections.choose(session_id, after=connection)
            try:
                how = {"timeout": _UNARY_TIMEOUT_S, "metadata": connection.metadata}
                answer = await connection.track(call(connection.stub, **how))
                self._connections.succeeded(connection)
                return answer
            except grpc.aio.AioRpcError as error:
                failure = error_from_rpc(error)
                if not another_may_answer(failure):
                    raise failure from None
                self._connections.failed(connection)
        raise failure or Unavailable("STREAM_BROKEN", "no coordinator was tried")
