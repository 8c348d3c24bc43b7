"""Envoy's descriptors as domain values: whose request it is, its facts, and limits of its own.

Envoy lets a request through when it is answered by an error, so that what a client may send (a
path, a header) is never refused: what is too long is shortened, and still told apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.ratelimit.envoy.contract import UNIT_NAMES
from agent360.mesh.ratelimit.limits import PLAN, TENANT, Algorithm, Limit, Source
from agent360.mesh.ratelimit.windows import Calendar
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.validation import TENANT_PATTERN, TENANT_RULE, Violations

MOST_HITS: Final = 2**32 - 1
OVERRIDE_ID: Final = "envoy:override"
"""Id of every limit that a descriptor brings; none that is configured can have it."""

_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9_.-]")
_LONGEST_KEY: Final = 64
_LONGEST_VALUE: Final = 256
_MAX_DESCRIPTORS: Final = 100
_MAX_ENTRIES: Final = 64
_DOMAIN: Final = "~domain"
"""A fact of overrides that no entry can be named like."""
_PERIODS_S: Final = {"SECOND": 1.0, "MINUTE": 60.0}


class Question(NamedTuple):
    """One descriptor of a request."""

    tenant: str
    """Whose request it is."""
    facts: dict[str, str]
    """Its entries."""
    hits: int
    """How much is charged."""
    override: Limit | None
    """The limit that it brings, which decides in place of those that are configured."""


def read_questions(call: Call, request: Any) -> list[Question]:
    """The descriptors of a RateLimitRequest, in order.

    Raises:
        InvalidRequestError: it has no domain or descriptors, or names no possible tenant.
        MeshError: PERMISSION_DENIED; the caller may not speak for a tenant that it names.
    """
    faults = Violations()
    faults.text("domain", request.domain, max_bytes=128)
    faults.count("descriptors", len(request.descriptors), at_least=1, at_most=_MAX_DESCRIPTORS)
    found = []
    for index, descriptor in enumerate(request.descriptors):
        field = f"descriptors[{index}]"
        faults.count(f"{field}.entries", len(descriptor.entries), at_least=0, at_most=_MAX_ENTRIES)
        facts = _facts_of(descriptor.entries)
        tenant = facts.pop(TENANT, call.tenant)
        faults.matches(f"{field}.entries[tenant]", tenant, TENANT_PATTERN, TENANT_RULE)
        hits = request.hits_addend or 1
        if descriptor.HasField("hits_addend"):
            hits = min(descriptor.hits_addend.value, MOST_HITS)
        override = None
        if descriptor.HasField("limit"):
            facts[_DOMAIN] = request.domain
            override = _override_of(descriptor.limit, facts, f"{field}.limit", faults)
        found.append(Question(tenant, facts, hits, override))
    faults.raise_if_any()
    for question in found:
        if not call.principal.may_speak_for(question.tenant):
            raise MeshError(
                grpc.StatusCode.PERMISSION_DENIED,
                "TENANT_NOT_ALLOWED",
                f"key {call.principal.name!r} may not speak for tenant {question.tenant!r}",
                metadata={"tenant": question.tenant},
            )
    return found


def _facts_of(entries: Iterable[Any]) -> dict[str, str]:
    """Entries by name; the second of one name is NAME.2, and ``plan`` is ``entry.plan``."""
    facts: dict[str, str] = {}
    for entry in entries:
        name = _NOT_IN_NAMES.sub("_", entry.key.lower()) or "_"
        if name == PLAN:  # the service says which plan a tenant is on
            name = f"entry.{PLAN}"
        name = _shortened(name, _LONGEST_KEY, ".", 32)
        number, distinct = 1, name
        while distinct in facts:
            number += 1
            distinct = f"{name[: _LONGEST_KEY - 3]}.{number}"
        facts[distinct] = _shortened(entry.value, _LONGEST_VALUE, "~", 64)
    return facts


def _shortened(text: str, most: int, mark: str, digits: int) -> str:
    """At most so many bytes: a longer text begins as it did and ends with a hash of the whole."""
    packed = text.encode()
    if len(packed) <= most:
        return text
    kept = packed[: most - len(mark) - digits].decode(errors="ignore")
    return f"{kept}{mark}{hashlib.sha256(packed).hexdigest()[:digits]}"


def _override_of(given: Any, facts: dict[str, str], field: str, faults: Violations) -> Limit | None:
    unit = UNIT_NAMES.get(given.unit, "UNKNOWN")
    if unit == "UNKNOWN":
        known = ", ".join(name.lower() for name in UNIT_NAMES.values() if name != "UNKNOWN")
        faults.add(f"{field}.unit", f"must be one of {known}")
        return None
    calendar = None if unit in _PERIODS_S else Calendar[unit]
    return Limit(
        limit_id=OVERRIDE_ID,
        amount=given.requests_per_unit,
        period_s=_PERIODS_S[unit] if calendar is None else calendar.length_s,
        per=(TENANT, *sorted(facts)),
        algorithm=Algorithm.FIXED_WINDOW,
        calendar=calendar,
        source=Source.REQUEST,
    )
