"""Whether the condition of a rule holds, and for which groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from agent360.mesh.metrics.alerts.rules import COMPARISONS, AlertRule, Labels
from agent360.mesh.metrics.frame import BUCKET_S
from agent360.mesh.metrics.queries.engine import QueryEngine
from agent360.mesh.metrics.queries.query import Query


class _Found(NamedTuple):
    value: float
    samples: int


async def groups_that_hold(
    engine: QueryEngine, rule: AlertRule, now_s: float
) -> Mapping[Labels, float]:
    """The groups for which the condition holds over all windows, with the value of the first.

    A group without samples has no value, and then nothing holds; a quotient whose divisor is zero
    or missing has none either.

    Raises:
        MeshError: the query is refused.
        StoreError: the store cannot be read now.
    """
    compare = COMPARISONS[rule.comparison]
    found: dict[Labels, float] | None = None
    for window_s in rule.windows_s:
        values = await _values(engine, rule, window_s, now_s)
        holding = {group: v for group, v in values.items() if compare(v, rule.threshold)}
        if found is None:
            found = holding
        else:
            found = {group: value for group, value in found.items() if group in holding}
        if not found:
            break
    return found or {}


async def _values(
    engine: QueryEngine, rule: AlertRule, window_s: int, now_s: float
) -> dict[Labels, float]:
    found = await _ask(engine, rule.query, window_s, now_s)
    if rule.divide_by is None:
        return {group: each.value for group, each in found.items() if each.samples >= rule.at_least}
    divisors = await _ask(engine, rule.divide_by, window_s, now_s)
    quotients = {}
    for group, divisor in divisors.items():
        dividend = found.get(group)
        if divisor.value == 0 or divisor.value < rule.at_least:
            continue
        if dividend is not None:
            quotients[group] = dividend.value / divisor.value
        elif rule.query.aggregation.adds_up:
            quotients[group] = 0.0
    return quotients


async def _ask(
    engine: QueryEngine, query: Query, window_s: int, now_s: float
) -> dict[Labels, _Found]:
    """One value for each group, over the window that ends with the present bucket."""
    end_s = int(now_s // BUCKET_S + 1) * BUCKET_S
    ranged = replace(query, start_s=end_s - window_s, end_s=end_s, step_s=window_s)
    return {
        group.labels: _Found(float(group.values[0, 0]), int(group.counts[0]))
        for group in await engine.answer(ranged)
    }
