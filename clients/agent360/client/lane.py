"""A lane: the stream to one address, reopened when it is drained or breaks."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import grpc

from agent360.client.errors import MeshError, UnavailableError
from agent360.client.operation import Operation
from agent360.client.session import Bounds, Session

_FIRST_BACKOFF_S: Final = 0.05
_MAX_BACKOFF_S: Final = 1.0
_LOOK_AGAIN_S: Final = 0.25


class Lane:
    """One server address. Opens its stream when there is something to send.

    Invariants: an operation is in ``_pending`` or open on exactly one session; one that was written
    to a stream that broke is sent again only if it is repeatable, else it fails.
    """

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        open_stream: Callable[[grpc.aio.Channel], Any],
        request_class: type[Any],
        bounds: Bounds,
        *,
        give_back: Callable[[Lane, list[Operation]], None],
    ) -> None:
        """Makes a lane.

        Args:
            address: of the server, for messages.
            channel: to the server; closed with the lane.
            open_stream: opens a Pipeline call on a channel.
            request_class: the service's PipelineRequest.
            bounds: of messages.
            give_back: takes operations that must find another lane, or wait for this one.
        """
        self.address = address
        self.channel = channel
        self._open_stream = open_stream
        self._request_class = request_class
        self._bounds = bounds
        self._give_back = give_back
        self._pending: deque[Operation] = deque()
        self._session: Session | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._retiring: set[Session] = set()
        self._wanted = asyncio.Event()
        self.failures = 0
        """Attempts to open a stream that failed, since the last answer."""
        self.last_error: MeshError | None = None
        """Why the last attempt failed."""
        self.down_since: float | None = None
        """When the address stopped answering, on the loop's clock; None while it answers."""
        self._closed = False
        self._keeper = asyncio.create_task(self._keep())

    @property
    def load(self) -> int:
        """Items that wait to be written or answered."""
        session = self._session
        return len(self._pending) + (len(session.open) if session is not None else 0)

    def submit(self, operation: Operation) -> None:
        """Takes an operation; it goes out with the next message."""
        self._pending.append(operation)
        if self._session is not None:
            self._session.wake()
        else:
            self._wanted.set()

    def withdraw(self, operation: Operation) -> None:
        """Nobody waits for an operation any more."""
        for session in self._sessions():
            session.withdraw(operation)

    def give_credit(self, item_id: int, operation: Operation, chunks: int) -> None:
        """Lets the service send more of a streamed answer."""
        for session in self._sessions():
            if session.open.get(item_id) is operation:
                session.give_credit(item_id, chunks)

    def operations(self) -> list[Operation]:
        """Everything that is not answered yet."""
        found: dict[int, Operation] = {id(operation): operation for operation in self._pending}
        for session in self._sessions():
            for operation in session.open.values():
                found[id(operation)] = operation
        return list(found.values())

    async def close(self, grace_s: float = 0.0) -> None:
        """Ends the lane: what is in flight has ``grace_s`` to be answered, the rest fails."""
        self._closed = True
        for session in self._sessions():
            session.close()
        if grace_s > 0 and self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        self._keeper.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(self._keeper, *self._tasks, return_exceptions=True)
        error = client_closed()
        for operation in self.operations():
            operation.fail(error)
        await self.channel.close()

    def leave(self) -> None:
        """The address is gone: nothing new is written; what is open is answered."""
        self._give_back(self, self._take_pending())
        for session in self._sessions():
            session.close()

    # ---------------------------------------------------------------- keeping a stream open

    def _sessions(self) -> list[Session]:
        current = [self._session] if self._session is not None else []
        return [*current, *self._retiring]

    def _take_pending(self) -> list[Operation]:
        taken = [operation for operation in self._pending if not operation.ended]
        self._pending.clear()
        return taken

    async def _keep(self) -> None:
        while not self._closed:
            if self.failures:
                await self._wait_until_reachable()
            if not self._pending:
                self._wanted.clear()
                await self._wanted.wait()
                continue
            session = Session(
                self._open_stream(self.channel),
                self._pending,
                self._request_class,
                self._bounds,
                on_answer=self._on_answer,
            )
            self._session = session
            session.wake()
            task = asyncio.create_task(self._attend(session))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await session.superseded.wait()
            if self._session is session:
                self._session = None
                self._retiring.add(session)

    async def _wait_until_reachable(self) -> None:
        """Returns when the server accepts connections again; meanwhile others may take over."""
        backoff = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (self.failures - 1))
        await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
        state = self.channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            try:
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self.channel.wait_for_state_change(state)
            except TimeoutError:
                pass
            if self.down_since is None:
                # A last answer of a stream that was drained says nothing about new ones.
                self.down_since = asyncio.get_running_loop().time()
            if self._pending:
                self._give_back(self, self._take_pending())
            state = self.channel.get_state(try_to_connect=True)
        self.down_since = None
        if not self._pending:
            self.failures = 0

    async def _attend(self, session: Session) -> None:
        """Runs a session to its end, then finds new homes for what it left open."""
        error = None
        try:
            error = await session.run()
        finally:
            if self._session is session:
                self._session = None
            self._retiring.discard(session)
            self._bury(session, error)

    def _bury(self, session: Session, error: MeshError | None) -> None:
        if error is not None and not session.answered:
            self.failures += 1
            self.last_error = error
            if self.down_since is None:
                self.down_since = asyncio.get_running_loop().time()
        left = list({id(op): op for op in session.open.values()}.values())
        session.open.clear()
        again = []
        for operation in left:
            if operation.ended:
                continue
            if operation.repeatable and not _is_refusal(error):
                again.append(operation)
            else:
                operation.fail(_lost(self.address, error))
        if error is not None and _is_refusal(error):
            for operation in self._take_pending():
                operation.fail(error)
        if error is not None and not session.answered:
            again += self._take_pending()
        if again:
            self._give_back(self, again)
        self._wanted.set()

    def _on_answer(self) -> None:
        self.failures = 0
        self.down_since = None


def client_closed() -> MeshError:
    """What calls end with that a closed client cannot make any more."""
    return UnavailableError("the client was closed", reason="CLIENT_CLOSED")


def _is_refusal(error: MeshError | None) -> bool:
    """Whether the stream was refused for a reason that a new one would meet again."""
    return error is not None and error.code in {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INVALID_ARGUMENT,
    }


def _lost(address: str, error: MeshError | None) -> MeshError:
    if error is not None and _is_refusal(error):
        return error
    why = error.message if error is not None else "the stream was closed"
    return UnavailableError(
        f"the connection to {address} broke before the answer arrived ({why}); "
        "whether the call was carried out is not known",
        reason="ANSWER_LOST",
        metadata={"address": address},
    )
