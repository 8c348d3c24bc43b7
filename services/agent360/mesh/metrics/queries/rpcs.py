"""The RPCs Query, ListSeries and Watch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from agent360.client.errors import InvalidRequestError, Violation
from agent360.mesh.metrics.history import History
from agent360.mesh.metrics.queries.engine import QueryEngine
from agent360.mesh.metrics.queries.messages import group_messages, series_message, without_page
from agent360.mesh.metrics.queries.query import Aggregation, Group, Query
from agent360.mesh.metrics.queries.reading import asked_tenant, read_matchers, read_query
from agent360.mesh.metrics.queries.watches import SIGN_OF_LIFE_S, Watches
from agent360.mesh.metrics.series import NAME, SeriesId
from agent360.mesh.metrics.storage import stored
from agent360.mesh.runtime.call import ANY_TENANT, Call
from agent360.mesh.runtime.pages import (
    decode_page_token,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.validation import Violations, seconds_of
from agent360.metrics.v1 import metrics_pb2 as pb

_PAGE_POINTS: Final = 200_000
"""Points of a page, beyond which it has no second group."""


class QueryRpcs:
    """Answers questions about series, in pages and streams."""

    def __init__(
        self,
        engine: QueryEngine,
        history: History,
        watches: Watches,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._history = history
        self._watches = watches
        self._now = now

    async def query(self, call: Call, request: Any) -> Any:
        """Aggregates series over a time range."""
        size = page_size(request.page_size)
        masked = read_mask(request, pb.Group)
        query = read_query(asked_tenant(call), request, self._now())
        owner, fingerprint = _owner(call), without_page(request)
        position = decode_page_token(owner, fingerprint, request.page_token)
        offset = 0
        if position is not None:
            # The range of the first page: an answer up to now would be another one each time.
            offset, query = _continued(query, position)
        groups = await stored(self._engine.answer(query))
        page = _page(groups[offset : offset + size], query)
        response = pb.QueryResponse()
        is_quantiles = query.aggregation is Aggregation.QUANTILES
        response.groups.extend(
            await asyncio.to_thread(group_messages, page, masked, quantiles=is_quantiles)
        )
        if len(groups) > offset + len(page):
            response.next_page_token = encode_page_token(
                owner, fingerprint, [offset + len(page), query.start_s, query.end_s, query.step_s]
            )
        return response

    async def list_series(self, call: Call, request: Any) -> Any:
        """Lists series."""
        size = page_size(request.page_size)
        masked = read_mask(request, pb.Series)
        faults = Violations()
        if request.name:
            faults.matches("name", request.name, NAME, "must be a metric's name, or empty")
        matchers = read_matchers(faults, request.matchers)
        faults.raise_if_any()
        tenant, owner, fingerprint = asked_tenant(call), _owner(call), without_page(request)
        position = decode_page_token(owner, fingerprint, request.page_token)
        found = await stored(self._history.find(tenant, request.name, matchers))
        if position is not None:
            found = _after(found, position)
        response = pb.ListSeriesResponse()
        for series in found[:size]:
            response.series.append(masked(series_message(series, tenant)))
        if len(found) > size:
            response.next_page_token = encode_page_token(owner, fingerprint, _key(found[size - 1]))
        return response

    async def watch(self, call: Call, request: Any) -> AsyncIterator[Any]:
        """Answers a query again and again."""
        asked, tenant = request.query, asked_tenant(call)
        masked = read_mask(asked, pb.Group)
        interval_s = _read_watch(request, tenant, self._now())

        def read(now_s: float) -> Query:
            return read_query(tenant, asked, now_s)

        is_quantiles = asked.aggregation == pb.AGGREGATION_QUANTILES
        async for news in self._watches.watch(
            _owner(call), read, interval_s, steps=asked.HasField("step")
        ):
            response = pb.WatchResponse()
            response.groups.extend(group_messages(news.groups, masked, quantiles=is_quantiles))
            response.complete_until.seconds = news.complete_until_s
            yield response


def _read_watch(request: Any, tenant: str | None, now_s: float) -> float:
    """Checks a WatchRequest; returns the seconds between answers."""
    faults, asked = Violations(), request.query
    faults.require("query.end_time", not asked.HasField("end_time"), "must be absent")
    for field in ("page_size", "page_token"):
        faults.require(f"query.{field}", not getattr(asked, field), "must be absent")
    interval_s = SIGN_OF_LIFE_S
    if request.HasField("interval"):
        interval_s = seconds_of(request.interval)
        faults.require("interval", interval_s >= 1, "must be at least 1 s")
    elif asked.HasField("step"):
        interval_s = seconds_of(asked.step)
    try:
        read_query(tenant, asked, now_s)
    except InvalidRequestError as error:
        for each in error.violations:
            faults.add(f"query.{each.field}", each.description)
    faults.raise_if_any()
    return interval_s


def _owner(call: Call) -> str:
    """Whom page tokens and watches belong to."""
    return ANY_TENANT if call.all_tenants else call.tenant


def _continued(query: Query, position: Any) -> tuple[int, Query]:
    """Where a further page begins, and the query with the range of the first page."""
    match position:
        case [int() as offset, int() as start_s, int() as end_s, int() as step_s] if (
            offset >= 0
            and step_s > 0
            and start_s < end_s
            and (end_s - start_s) % step_s == 0
            and (step_s == query.step_s or end_s - start_s == step_s)
        ):
            return offset, replace(query, start_s=start_s, end_s=end_s, step_s=step_s)
    raise _garbled()


def _after(found: list[SeriesId], position: Any) -> list[SeriesId]:
    """The series behind the place where the page before ended."""
    try:
        return [series for series in found if _key(series) > position]
    except TypeError as error:
        raise _garbled() from error


def _garbled() -> InvalidRequestError:
    return InvalidRequestError([Violation("page_token", "is not a token of this service")])


def _page(groups: Sequence[Group], query: Query) -> list[Group]:
    """As many groups as make a message of moderate size; at least one, if there is one."""
    page: list[Group] = []
    points = 0
    for group in groups:
        points += group.values.size * (1 + 2 * len(query.offsets_s))
        if page and points > _PAGE_POINTS:
            break
        page.append(group)
    return page


def _key(series: SeriesId) -> list[Any]:
    """The place of a series in lists, as JSON has it."""
    labels = [list(pair) for pair in series.labels]
    return [series.tenant, series.name, labels, int(series.kind), series.unit]
