"""The TOML file that limits and plans come from."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

from agent360.mesh.ratelimit.limits import (
    ID_PATTERN,
    TENANT,
    Algorithm,
    FailureMode,
    Limit,
    LimitsError,
    LimitSet,
)
from agent360.mesh.ratelimit.windows import Calendar
from agent360.mesh.runtime.toml_places import Places

_PERIOD: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_BY_LENGTH: Final = {unit.length_s: unit for unit in (Calendar.HOUR, Calendar.DAY, Calendar.WEEK)}
MAX_AMOUNT: Final = 10**12

_FIELDS: Final = {
    "id": str,
    "name": str,
    "match": dict,
    "per": list,
    "algorithm": str,
    "amount": int,
    "period": (str, int, float),
    "burst": int,
    "time_zone": str,
    "failure_mode": str,
    "shadow": bool,
    "strict": bool,
    "tenant": str,
    "plan": str,
    "group": str,
}


class _WrongFieldError(ValueError):
    """A field is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def read_limits(file: Path) -> LimitSet:
    """Reads a limits file: ``[[limits]]`` with the fields of ``Limit``, ``[tenants]`` with plans.

    Raises:
        LimitsError: it cannot be read, or an entry is wrong; the message names file and line.
    """
    try:
        text = file.read_text()
        content = tomllib.loads(text)
    except OSError as error:
        raise LimitsError(f"{file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LimitsError(f"{file}: {error}") from error
    place = Places(file, text, "limits")
    unknown = sorted(set(content) - {"limits", "tenants"})
    if unknown:
        line = place.of_key(unknown[0])
        raise LimitsError(f"{line}: {unknown[0]!r} is not known; expected [[limits]] or [tenants]")
    entries = content.get("limits", [])
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise LimitsError(f"{place.of_key('limits')}: limits are written as [[limits]]")
    limits: dict[tuple[str, str, str], Limit] = {}
    for number, entry in enumerate(entries):
        named = f"limit {number + 1} ({entry.get('id', 'without id')})"
        try:
            limit = _read_limit(entry)
        except _WrongFieldError as error:
            raise LimitsError(f"{place.of(number, error.field)}: {named}: {error}") from None
        if limit.key in limits:
            raise LimitsError(f"{place.of(number, 'id')}: {named}: stands twice")
        limits[limit.key] = limit
    return LimitSet(limits.values(), _read_plans(content.get("tenants", {}), place))


def _read_plans(table: Any, place: Places) -> Mapping[str, str]:
    if not isinstance(table, dict):
        raise LimitsError(f"{place.of_key('tenants')}: [tenants] is a table of plans by tenant")
    for tenant, plan in table.items():
        if not isinstance(plan, str) or _NAME.fullmatch(plan) is None:
            raise LimitsError(f"{place.of_key(tenant)}: the plan of {tenant!r} must be a name")
    return table


def _read_limit(entry: Mapping[str, Any]) -> Limit:
    for key, value in entry.items():
        expected: Any = _FIELDS.get(key)
        if expected is None:
            raise _WrongFieldError(key, f"{key!r} is not known; known: {', '.join(_FIELDS)}")
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
            raise _WrongFieldError(key, f"{key} has a value of the wrong type: {value!r}")
    algorithm = _choice(entry, "algorithm", Algorithm, Algorithm.TOKEN_BUCKET)
    period_s, calendar = _read_period(entry, algorithm)
    limit = Limit(
        limit_id=entry.get("id", ""),
        amount=entry.get("amount", 0),
        period_s=period_s,
        name=entry.get("name", ""),
        match=_strings(entry, "match"),
        per=tuple(_strings(entry, "per") if "per" in entry else (TENANT,)),
        algorithm=algorithm,
        burst=entry.get("burst", 0),
        calendar=calendar,
        time_zone=entry.get("time_zone", ""),
        failure_mode=_choice(entry, "failure_mode", FailureMode, FailureMode.OPEN),
        shadow=entry.get("shadow", False),
        strict=entry.get("strict", False),
        tenant=entry.get("tenant", ""),
        plan=entry.get("plan", ""),
        group=entry.get("group", ""),
    )
    for field, fault in faults_of(limit):
        raise _WrongFieldError("id" if field == "limit_id" else field, fault)
    return limit


def _choice(entry: Mapping[str, Any], field: str, kind: Any, default: Any) -> Any:
    try:
        return kind(entry.get(field, default.value))
    except ValueError:
        known = ", ".join(each.value for each in kind)
        raise _WrongFieldError(field, f"{field} must be one of {known}") from None


def _strings(entry: Mapping[str, Any], field: str) -> Any:
    given = entry.get(field, {})
    values: Iterable[Any] = given.values() if isinstance(given, dict) else given
    if not all(isinstance(value, str) for value in values):
        raise _WrongFieldError(field, f"{field} must hold texts")
    return given


def _read_period(entry: Mapping[str, Any], algorithm: Algorithm) -> tuple[float, Calendar | None]:
    value = entry.get("period")
    if algorithm is Algorithm.CONCURRENCY:
        if value is not None:
            raise _WrongFieldError("period", "period is not used by concurrency")
        return 0.0, None
    if isinstance(value, str) and value.upper() in Calendar.__members__:
        calendar = Calendar[value.upper()]
        return calendar.length_s, calendar
    period_s = 0.0
    if isinstance(value, int | float):
        period_s = float(value)
    elif isinstance(value, str) and (matched := _PERIOD.fullmatch(value)):
        period_s = float(matched[1]) * _UNITS_S[matched[2]]
    if not 0 < period_s < 1e10:
        raise _WrongFieldError(
            "period",
            "period must be seconds, a text such as '1m', or one of "
            f"{', '.join(unit.name.lower() for unit in Calendar)}; is {value!r}",
        )
    return period_s, calendar_of(period_s, entry.get("time_zone", ""))


def calendar_of(period_s: float, time_zone: str) -> Calendar | None:
    """The calendar's period that a length means where a time zone is given."""
    return _BY_LENGTH.get(period_s) if time_zone else None


def faults_of(limit: Limit) -> list[tuple[str, str]]:
    """What is wrong with a limit, by field."""
    algorithm, calendar = limit.algorithm, limit.calendar
    token_bucket = algorithm is Algorithm.TOKEN_BUCKET
    fixed = algorithm is Algorithm.FIXED_WINDOW
    zone = limit.time_zone
    named = ID_PATTERN.fullmatch(limit.limit_id) is not None
    amount = f"amount must be a positive whole number up to {MAX_AMOUNT:,}"
    burst = f"burst must not be negative, nor above {MAX_AMOUNT:,}"
    rules = [
        ("limit_id", named, f"id must match {ID_PATTERN.pattern}"),
        ("amount", 0 < limit.amount <= MAX_AMOUNT, amount),
        ("burst", 0 <= limit.burst <= MAX_AMOUNT, burst),
        ("burst", not limit.burst or token_bucket, "burst is of token_bucket only"),
        ("period", calendar is None or fixed, "a calendar's period is of fixed_window only"),
        ("time_zone", not zone or calendar is not None, "a time zone needs a calendar's period"),
        ("time_zone", not zone or _known_zone(zone), f"there is no time zone {zone!r}"),
        ("match", len(limit.match) <= 16, "match must have at most 16 elements"),
        ("per", len(limit.per) <= 16, "per must have at most 16 elements"),
        ("plan", not (limit.tenant and limit.plan), "a tenant's own limit has no plan"),
    ]
    for field in ("tenant", "plan", "group"):
        value = getattr(limit, field)
        holds = not value or _NAME.fullmatch(value) is not None
        rules.append((field, holds, f"{field} must match {_NAME.pattern}"))
    return [(field, fault) for field, holds, fault in rules if not holds]


def _known_zone(name: str) -> bool:
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        return False
    return True
