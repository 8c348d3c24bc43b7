"""The coalescer: calls of many tasks become items of messages on a few open streams."""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import grpc

from agent360.client.addresses import RESOLVE_EVERY_S, Endpoint, resolve
from agent360.client.channel import MAX_MESSAGE_BYTES, Tls, open_channel
from agent360.client.context import CallScope, current_scope, traceparent_of_current_span
from agent360.client.errors import (
    DeadlineExceededError,
    MeshError,
    UnavailableError,
    from_rpc_error,
)
from agent360.client.lane import Lane, client_closed
from agent360.client.operation import Facts, Operation, SingleOperation
from agent360.client.session import Bounds

T = TypeVar("T")

_SMALLEST_OVERSIZE: Final = 2**20
_AWAY_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Wire:
    """The gRPC side of one service."""

    service: str
    """Full name, such as ``agent360.cache.v1.CacheService``."""
    request_class: type[Any]
    """Its PipelineRequest."""
    item_class: type[Any]
    """Its PipelineItem."""
    response_class: type[Any]
    """Its PipelineResponse."""
    result_class: type[Any]
    """Its PipelineResult."""


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """How a client connects and what its calls carry by default."""

    tenant: str = ""
    """On whose behalf calls are made unless they say otherwise; empty: the key's only tenant."""
    api_key: str = ""
    """Sent as ``authorization: Bearer``; empty: none."""
    tls: Tls | None = None
    """None: plaintext."""
    default_timeout_s: float = 10.0
    """Timeout of a call that names none."""
    patience_s: float = 3.0
    """How long calls wait for a service that cannot be reached before they fail at once."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Largest message; must not exceed the servers'."""
    bounds: Bounds = field(default_factory=Bounds)
    """Of messages and streams."""

    def metadata(self, tenant: str = "") -> tuple[tuple[str, str], ...]:
        """Metadata of an RPC for a tenant."""
        rows = []
        if self.api_key:
            rows.append(("authorization", f"Bearer {self.api_key}"))
        if tenant or self.tenant:
            rows.append(("x-agent360-tenant", tenant or self.tenant))
        return tuple(rows)


class Coalescer:
    """Sends the operations of one service.

    There is no timer: what waits while a message is being written goes out together in the next
    one, so a lone call is not delayed. Its tasks run in an empty context: the tenant or trace of
    the first caller must not leak into later calls.
    """

    def __init__(self, wire: Wire, addresses: Sequence[str], options: ConnectOptions) -> None:
        """Makes a coalescer; streams are opened by the first calls.

        Args:
            wire: the service.
            addresses: ``host:port`` of its replicas.
            options: of the connection.
        """
        self._wire = wire
        self._addresses = tuple(addresses)
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[Endpoint, Lane] = {}
        self._homeless: list[Operation] = []
        self._turns: deque[asyncio.Future[None]] = deque()
        self._in_flight = 0
        self._max_in_flight = options.bounds.in_flight
        self._next_expiry = math.inf
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._resolver: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._resolve_error: OSError | None = None
        self._looked_up = asyncio.Event()
        self._empty_context = contextvars.Context()
        self._default_facts = Facts(options.tenant, 0, "", "")
        self._closed = False
        self._oversize = min(_SMALLEST_OVERSIZE, options.max_message_bytes // 2)

    # ---------------------------------------------------------------- calls

    async def call(
        self,
        operation: SingleOperation[T],
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> T:
        """Sends one operation and returns its result.

        Args:
            operation: what to send.
            timeout: seconds; None: what remains in the current scope, or the default.
            tenant: on whose behalf; None: the current scope's, or the default.

        Raises:
            MeshError: what the service answered, or DEADLINE_EXCEEDED or UNAVAILABLE.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        operation.future = future
        self.prepare(operation, timeout, tenant)
        await self.take_turn(operation.deadline, 1)
        try:
            if operation.size_bytes > self._oversize:
                return await self._call_alone(operation)
            self.dispatch(operation)
            return await future
        except asyncio.CancelledError:
            future.cancel()
            self.withdraw(operation)
            raise
        finally:
            self.note_ended(1)

    def prepare(self, operation: Operation, timeout: float | None, tenant: str | None) -> None:
        """Gives an operation its facts and deadline, from the arguments and the current scope."""
        if self._closed:
            raise client_closed()
        scope = current_scope()
        now = self._loop.time()
        deadline = now + (self._options.default_timeout_s if timeout is None else timeout)
        if scope.deadline is not None and (timeout is None or scope.deadline < deadline):
            deadline = scope.deadline
        if deadline <= now:
            raise DeadlineExceededError("the deadline had passed before the call was sent")
        operation.deadline = deadline
        operation.facts = self._facts_of(scope, tenant)

    def dispatch(self, operation: Operation) -> None:
        """Hands an operation to the best lane."""
        if operation.deadline < self._next_expiry:
            self._expire_at(operation.deadline)
        lane = self._choose()
        if lane is None:
            self._wait_for_lane(operation)
        elif lane.down_since is None or not self._given_up(lane, self._loop.time()):
            lane.submit(operation)
        else:
            operation.fail(self._unreachable(lane))

    def withdraw(self, operation: Operation) -> None:
        """Nobody waits for an operation any more: the service is told."""
        for lane in self._lanes.values():
            lane.withdraw(operation)

    def give_credit(self, operation: Operation, item_id: int, chunks: int) -> None:
        """Lets the service send more of a streamed answer."""
        for lane in self._lanes.values():
            lane.give_credit(item_id, operation, chunks)

    @property
    def full(self) -> bool:
        """Whether ``take_turn`` would have to wait."""
        return self._in_flight >= self._max_in_flight or bool(self._turns)

    async def take_turn(self, deadline: float, items: int) -> None:
        """Waits until more may be in flight and counts ``items`` in; ``note_ended`` must follow."""
        if self.full:
            await self._take_turn(deadline)
        self._in_flight += items

    def note_ended(self, items: int) -> None:
        """Takes items off what is in flight."""
        self._in_flight -= items
        if self._turns:
            self._give_turns(items)

    @property
    def away(self) -> bool:
        """Whether the service was tried and none of its replicas answers."""
        lanes = self._lanes.values()
        return bool(lanes) and all(lane.down_since is not None for lane in lanes)

    @property
    def tenant(self) -> str:
        """On whose behalf calls are made unless they or the current scope say otherwise."""
        return self._options.tenant

    @property
    def default_timeout_s(self) -> float:
        """Timeout of a call that names none."""
        return self._options.default_timeout_s

    @property
    def max_message_bytes(self) -> int:
        """Largest message."""
        return self._options.max_message_bytes

    @property
    def bounds(self) -> Bounds:
        """Of messages and streams."""
        return self._options.bounds

    async def unary(
        self,
        method: str,
        request: Any,
        response_class: type[Any],
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Any:
        """Makes a unary RPC, for what is not an item of a stream.

        Args:
            method: name of the RPC.
            request: its request.
            response_class: of its response.
            timeout: as in ``call``.
            tenant: as in ``call``.
        """
        channel, metadata, remaining = await self._rpc(timeout, tenant)
        rpc = channel.unary_unary(
            f"/{self._wire.service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_class.FromString,
        )
        try:
            return await rpc(request, timeout=remaining, metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    async def streaming(
        self,
        method: str,
        request: Any,
        response_class: type[Any],
        timeout: float | None = None,
        tenant: str | None = None,
        *,
        lasting: bool = False,
    ) -> Any:
        """Opens a server-streaming RPC and returns the call, an async iterator of responses.

        Args:
            method: name of the RPC.
            request: its request.
            response_class: of its responses.
            timeout: as in ``call``.
            tenant: as in ``call``.
            lasting: the stream has no deadline.
        """
        channel, metadata, remaining = await self._rpc(timeout, tenant)
        rpc = channel.unary_stream(
            f"/{self._wire.service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_class.FromString,
        )
        return rpc(request, timeout=None if lasting else remaining, metadata=metadata)

    async def channel(self) -> grpc.aio.Channel:
        """A channel to one of the replicas."""
        if self._closed:
            raise client_closed()
        await self._resolved()
        lane = self._choose()
        if lane is None:
            raise self._unreachable()
        return lane.channel

    async def close(self, grace_s: float = 0.0) -> None:
        """Closes all streams; what is in flight has ``grace_s`` to be answered."""
        self._closed = True
        if self._resolver is not None:
            self._resolver.cancel()
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        await asyncio.gather(*(lane.close(grace_s) for lane in self._lanes.values()))
        for task in self._background:
            task.cancel()
        error = client_closed()
        for operation in self._homeless:
            operation.fail(error)
        for turn in self._turns:
            if not turn.done():
                turn.set_exception(error)

    # ---------------------------------------------------------------- context

    def _facts_of(self, scope: CallScope, tenant: str | None) -> Facts:
        traceparent = scope.traceparent or traceparent_of_current_span()
        name = tenant if tenant is not None else scope.tenant or self._options.tenant
        if not (scope.priority or traceparent or scope.request_id) and name == self._options.tenant:
            return self._default_facts
        return Facts(name, scope.priority, traceparent, scope.request_id)

    async def _rpc(
        self, timeout: float | None, tenant: str | None
    ) -> tuple[grpc.aio.Channel, list[tuple[str, str]], float]:
        scope = current_scope()
        facts = self._facts_of(scope, tenant)
        remaining = self._options.default_timeout_s if timeout is None else timeout
        if scope.deadline is not None:
            left = scope.deadline - self._loop.time()
            remaining = left if timeout is None else min(left, remaining)
        if remaining <= 0:
            raise DeadlineExceededError("the deadline had passed before the call was sent")
        metadata = list(self._options.metadata(facts.tenant))
        if facts.traceparent:
            metadata.append(("traceparent", facts.traceparent))
        if facts.request_id:
            metadata.append(("x-request-id", facts.request_id))
        if facts.priority:
            metadata.append(("x-agent360-priority", _PRIORITY_NAMES[facts.priority]))
        return await self.channel(), metadata, remaining

    # ---------------------------------------------------------------- lanes

    def _choose(self) -> Lane | None:
        """The lane with less in flight, of two taken by chance among those that answer."""
        lanes = self._lanes
        if len(lanes) == 1:
            return next(iter(lanes.values()))
        if not lanes:
            return None
        answering = [lane for lane in lanes.values() if lane.down_since is None]
        candidates = answering or list(lanes.values())
        if len(candidates) == 1:
            return candidates[0]
        first, second = random.sample(candidates, 2)
        return first if first.load <= second.load else second

    def _wait_for_lane(self, operation: Operation) -> None:
        self._homeless.append(operation)
        if self._resolver is None:
            self._resolver = self._spawn(self._keep_resolved())
        elif self._resolve_error is not None:
            self._homeless.remove(operation)
            operation.fail(self._unreachable())

    async def _resolved(self) -> None:
        if self._resolver is None:
            self._resolver = self._spawn(self._keep_resolved())
        await self._looked_up.wait()

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work, context=self._empty_context.copy())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _keep_resolved(self) -> None:
        while not self._closed:
            try:
                endpoints = await resolve(self._addresses)
            except OSError as error:
                self._resolve_error = error
                for operation in self._take_homeless():
                    operation.fail(self._unreachable())
            else:
                self._resolve_error = None
                self._adopt(endpoints)
            self._looked_up.set()
            await asyncio.sleep(_AWAY_RETRY_S if self._resolve_error else RESOLVE_EVERY_S)

    def _adopt(self, endpoints: Sequence[Endpoint]) -> None:
        """Opens lanes to new endpoints and leaves those that are gone."""
        gone = [endpoint for endpoint in self._lanes if endpoint not in endpoints]
        for endpoint in endpoints:
            if endpoint not in self._lanes:
                self._lanes[endpoint] = self._open_lane(endpoint)
        for endpoint in gone:
            lane = self._lanes.pop(endpoint)
            lane.leave()
            self._spawn(lane.close(self._options.default_timeout_s))
        for operation in self._take_homeless():
            self.dispatch(operation)

    def _take_homeless(self) -> list[Operation]:
        taken, self._homeless = self._homeless, []
        return [operation for operation in taken if not operation.ended]

    def _open_lane(self, endpoint: Endpoint) -> Lane:
        options = self._options
        return Lane(
            endpoint.target,
            open_channel(
                endpoint.target,
                host=endpoint.host,
                tls=options.tls,
                max_message_bytes=options.max_message_bytes,
            ),
            self._open_stream,
            self._wire.request_class,
            options.bounds,
            give_back=self._rehome,
        )

    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        rpc = channel.stream_stream(
            f"/{self._wire.service}/Pipeline",
            request_serializer=self._wire.request_class.SerializeToString,
            response_deserializer=self._wire.response_class.FromString,
        )
        return rpc(metadata=self._options.metadata())

    def _rehome(self, origin: Lane, operations: list[Operation]) -> None:
        """Finds lanes for operations whose stream could not be opened or broke."""
        if self._closed:
            for operation in operations:
                operation.fail(client_closed())
            return
        now = self._loop.time()
        for operation in operations:
            lane = self._choose()
            if lane is None:
                self._wait_for_lane(operation)
            elif self._given_up(lane, now):
                operation.fail(self._unreachable(lane if lane.last_error else origin))
            else:
                lane.submit(operation)

    def _given_up(self, lane: Lane, now: float) -> bool:
        return lane.down_since is not None and now - lane.down_since > self._options.patience_s

    def _unreachable(self, lane: Lane | None = None) -> MeshError:
        where = lane.address if lane is not None else ", ".join(self._addresses)
        cause = (
            lane.last_error.message if lane is not None and lane.last_error else self._resolve_error
        )
        return UnavailableError(
            f"{self._wire.service} cannot be reached at {where}: {cause}",
            reason="UNREACHABLE",
            metadata={"service": self._wire.service, "address": where},
            retry_after_s=_AWAY_RETRY_S,
        )

    # ---------------------------------------------------------------- deadlines and turns

    def _expire_at(self, deadline: float) -> None:
        self._next_expiry = deadline
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        self._expiry_timer = self._loop.call_at(
            deadline, self._expire, context=self._empty_context.copy()
        )

    def _expire(self) -> None:
        """Fails what is past its deadline; looks at everything in flight, once a deadline."""
        now = self._loop.time()
        self._expiry_timer = None
        self._next_expiry = earliest = math.inf
        in_flight = [op for lane in self._lanes.values() for op in lane.operations()]
        for operation in (*in_flight, *self._homeless):
            if operation.ended:
                continue
            if operation.deadline <= now:
                self._fail_late(operation)
            else:
                earliest = min(earliest, operation.deadline)
        if earliest < self._next_expiry:
            self._expire_at(earliest)

    def _fail_late(self, operation: Operation) -> None:
        down = [lane for lane in self._lanes.values() if lane.down_since is not None]
        if self._lanes and len(down) == len(self._lanes):
            operation.fail(self._unreachable(down[0]))
        else:
            operation.fail(DeadlineExceededError())
        self.withdraw(operation)

    async def _take_turn(self, deadline: float) -> None:
        turn: asyncio.Future[None] = self._loop.create_future()
        self._turns.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except TimeoutError:
            raise DeadlineExceededError(
                f"the deadline passed while {self._in_flight:,} calls were in flight"
            ) from None

    def _give_turns(self, ended: int) -> None:
        """Lets one waiter go on for each item that ended."""
        while ended and self._turns and self._in_flight < self._max_in_flight:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                ended -= 1

    async def _call_alone(self, operation: SingleOperation[T]) -> T:
        """Sends an item that is too large to share a stream by the unary form of its RPC."""
        item = self._wire.item_class()
        operation.write(lambda: item, 1, [])
        request = getattr(item, operation.field)
        size = request.ByteSize()
        if size > self._options.max_message_bytes:
            raise MeshError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "MESSAGE_TOO_LARGE",
                f"the request takes {size:,} bytes; at most {self._options.max_message_bytes:,} "
                "can be sent",
                metadata={"size_bytes": str(size)},
            )
        result_field = self._wire.result_class.DESCRIPTOR.fields_by_name[operation.field]
        response_class = type(getattr(self._wire.result_class(), result_field.name))
        method = "".join(part.capitalize() for part in operation.field.split("_"))
        response = await self.unary(
            method,
            request,
            response_class,
            max(0.001, operation.deadline - self._loop.time()),
            operation.facts.tenant,
        )
        return operation.read(response)


_PRIORITY_NAMES: Final = ("", "low", "normal", "high")
