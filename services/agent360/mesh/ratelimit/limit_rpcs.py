"""The RPCs about limits: set, read, listed, removed; changes are audited."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from agent360.client import AuditEvent, Mesh
from agent360.mesh.ratelimit.book import LimitBook
from agent360.mesh.ratelimit.domain import Domain
from agent360.mesh.ratelimit.failures import limit_unknown, limits_are_admins
from agent360.mesh.ratelimit.limits import Limit
from agent360.mesh.ratelimit.settings import RateLimitSettings
from agent360.mesh.ratelimit.wire import limit_message, read_limit
from agent360.mesh.runtime.call import MESH_TENANT, Call
from agent360.mesh.runtime.pages import (
    decode_page_token,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.validation import Violations
from agent360.ratelimit.v1 import ratelimit_pb2 as pb


class LimitRpcs:
    """Serves SetLimit, GetLimit, ListLimits and DeleteLimit."""

    def __init__(
        self, settings: RateLimitSettings, mesh: Mesh, domain: Domain, book: LimitBook
    ) -> None:
        """Makes them.

        Args:
            settings: of the service.
            mesh: where changes are audited.
            domain: has the limits in force.
            book: takes changes.
        """
        self._settings = settings
        self._mesh = mesh
        self._domain = domain
        self._book = book

    async def set_limit(self, call: Call, request: Any) -> Any:
        """Makes or replaces a limit."""
        if not call.principal.admin:
            raise limits_are_admins()
        faults = Violations()
        faults.require("limit", request.HasField("limit"), "must be given")
        faults.raise_if_any()
        inner = Violations()
        limit = read_limit(request.limit, inner)
        faults.nested("limit", lambda nested: nested.found.extend(inner.found))
        faults.raise_if_any()
        before = self._book.limits.find(*limit.key)
        limit = await self._book.put(limit)
        self._audit("set", call, limit.limit_id, before, limit)
        return pb.SetLimitResponse(limit=limit_message(limit))

    async def delete_limit(self, call: Call, request: Any) -> Any:
        """Removes a limit that was set."""
        if not call.principal.admin:
            raise limits_are_admins()
        before = self._book.limits.find(request.limit_id, request.tenant, request.plan)
        await self._book.remove((request.limit_id, request.tenant, request.plan))
        self._audit("delete", call, request.limit_id, before, None)
        return pb.DeleteLimitResponse()

    async def get_limit(self, call: Call, request: Any) -> Any:
        """Reads the limit in force for the tenant."""
        limit = self._domain.limits.of(call.tenant).get(request.limit_id)
        if limit is None:
            raise limit_unknown(request.limit_id)
        masked = read_mask(request, pb.Limit)
        return pb.GetLimitResponse(limit=masked(limit_message(limit)))

    async def list_limits(self, call: Call, request: Any) -> Any:
        """Lists the limits in force for the tenant, in the order of their ids."""
        size = page_size(request.page_size)
        after = decode_page_token(call.tenant, b"limits", request.page_token)
        masked = read_mask(request, pb.Limit)
        limits = self._domain.limits.of(call.tenant)
        ids = sorted(each for each in limits if after is None or each > after)
        response = pb.ListLimitsResponse()
        for limit_id in ids[:size]:
            response.limits.append(masked(limit_message(limits[limit_id])))
        if len(ids) > size:
            response.next_page_token = encode_page_token(call.tenant, b"limits", ids[size - 1])
        return response

    def on_load(self, fault: str) -> None:
        """The limits file was read; ``fault`` is what was wrong, if anything."""
        if self._settings.limits is None:
            return
        event = AuditEvent(
            "ratelimit.limits.load",
            f"files/{self._settings.limits.name}",
            actor="ratelimit",
            outcome="failed" if fault else "succeeded",
            attributes={"fault": fault[:256]} if fault else {},
        )
        self._mesh.audit.note(event, tenant=MESH_TENANT)

    def _audit(
        self, what: str, call: Call, limit_id: str, before: Limit | None, after: Limit | None
    ) -> None:
        tenant = (before or after or _NO_LIMIT).tenant
        event = AuditEvent(
            f"ratelimit.limits.{what}",
            f"limits/{limit_id}",
            actor=call.principal.name,
            attributes={"tenant": tenant, "before": _shown(before), "after": _shown(after)},
        )
        self._mesh.audit.note(event, tenant=tenant or MESH_TENANT)


_NO_LIMIT: Final = Limit("", 1)


def _shown(limit: Limit | None) -> str:
    """A limit as JSON, without what is as it is by default; empty if there is none."""
    if limit is None:
        return ""
    fields: dict[str, Any] = msgspec.to_builtins(limit)
    default: dict[str, Any] = msgspec.to_builtins(_NO_LIMIT)
    shown = {
        name: value
        for name, value in fields.items()
        if name not in ("limit_id", "source", "updated")
        and (name == "amount" or value != default[name])
    }
    return msgspec.json.encode(shown).decode()
