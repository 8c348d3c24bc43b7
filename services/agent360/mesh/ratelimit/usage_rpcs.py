"""The RPCs about usage."""

from __future__ import annotations

from typing import Any

from agent360.mesh.ratelimit.decisions import Usage
from agent360.mesh.ratelimit.domain import Domain
from agent360.mesh.ratelimit.failures import limit_unknown, usage_is_operators
from agent360.mesh.ratelimit.limits import TENANT, Limit
from agent360.mesh.ratelimit.wire import usage_message
from agent360.mesh.runtime.call import ANY_TENANT, Call
from agent360.mesh.runtime.pages import (
    decode_page_token,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.ratelimit.v1 import ratelimit_pb2 as pb


class UsageRpcs:
    """Serves GetUsage and ListUsage.

    A tenant is told of its own counts, and of its own share of those that count several tenants;
    operators also of the latter as of all tenants.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    async def get_usage(self, call: Call, request: Any) -> Any:
        """Reads the usage of one count; one that was never used is whole."""
        together = request.all_tenants
        if together:
            _require_operator(call)
        limit = self._domain.limits.of(call.tenant).get(request.limit_id)
        if limit is None:
            raise limit_unknown(request.limit_id)
        together = together and not limit.tenants_apart
        wanted = dict(request.counted_by)
        usage = _unused(limit, wanted)
        if wanted.keys() == set(limit.per) - {TENANT}:
            known = {**wanted, TENANT: call.tenant}
            key = (*limit.key, limit.kind, *(known[fact] for fact in limit.per))
            for found in await self._domain.usage(call.tenant, key, together=together):
                usage = found
        return pb.GetUsageResponse(usage=usage_message(usage))

    async def list_usage(self, call: Call, request: Any) -> Any:
        """Lists the counts of the tenant that are in use, by limit and facts."""
        if request.all_tenants:
            _require_operator(call)
        size = page_size(request.page_size)
        query = b"usage/%d/%s" % (request.all_tenants, request.limit_id.encode())
        after = decode_page_token(call.tenant, query, request.page_token)
        masked = read_mask(request, pb.Usage)
        found = await self._domain.usage(call.tenant, together=request.all_tenants)
        rows = sorted(
            (
                ([usage.limit_id, *(value for _, value in usage.counted_by)], usage)
                for usage in found
                if request.limit_id in ("", usage.limit_id)
            ),
            key=lambda row: row[0],
        )
        rows = [row for row in rows if after is None or row[0] > after]
        response = pb.ListUsageResponse()
        for _, usage in rows[:size]:
            response.usages.append(masked(usage_message(usage)))
        if len(rows) > size:
            response.next_page_token = encode_page_token(call.tenant, query, rows[size - 1][0])
        return response


def _require_operator(call: Call) -> None:
    """Refuses who may not see what all tenants do."""
    if not (call.principal.admin or ANY_TENANT in call.principal.tenants):
        raise usage_is_operators()


def _unused(limit: Limit, counted_by: dict[str, str]) -> Usage:
    return Usage(limit.limit_id, tuple(counted_by.items()), 0, limit.size, limit.size, 0, 0, 0.0)
