"""Authentication of connections and RPCs by API key, and authorisation of every call's tenant."""

from __future__ import annotations

import hashlib
from typing import Final

import grpc

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.runtime.batch import Group
from agent360.mesh.runtime.call import ANY_TENANT, MESH_TENANT, Call, Principal
from agent360.mesh.runtime.settings import ApiKey, AuthenticationSettings, TenantSettings
from agent360.mesh.runtime.validation import TENANT_PATTERN, TENANT_RULE

ANONYMOUS: Final = Principal("anonymous", frozenset({ANY_TENANT}), admin=True)
"""Everyone, where no keys are configured: such a service listens on loopback only."""

_SCHEME: Final = "bearer "


class Authenticator:
    """Finds out who makes an RPC, from its ``authorization`` metadata."""

    def __init__(self, settings: AuthenticationSettings, service_key: str = "") -> None:
        """Makes an authenticator.

        Args:
            settings: the accepted keys.
            service_key: a key of the mesh's own services that is always accepted; empty: none.
        """
        self._principals = {key.sha256: _principal(key) for key in settings.keys}
        self._open = not settings.keys
        if service_key:
            digest = hashlib.sha256(service_key.encode()).hexdigest()
            self._principals.setdefault(
                digest, Principal("mesh", frozenset({ANY_TENANT}), service=True, admin=True)
            )

    def authenticate(self, authorization: str | None) -> Principal:
        """The principal that an ``authorization`` value proves.

        Raises:
            MeshError: UNAUTHENTICATED; there is no key, or it is not known.
        """
        if not authorization:
            if self._open:
                return ANONYMOUS
            raise _unauthenticated("API_KEY_MISSING", "send metadata 'authorization: Bearer KEY'")
        if authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise _unauthenticated("API_KEY_MALFORMED", "authorization must be 'Bearer KEY'")
        key = authorization[len(_SCHEME) :].strip()
        principal = self._principals.get(hashlib.sha256(key.encode()).hexdigest())
        if principal is None and self._open:
            return ANONYMOUS
        if principal is None:
            raise _unauthenticated("API_KEY_UNKNOWN", "the API key is not known here")
        return principal


class AuthenticationPolicy:
    """Every call names a tenant that its principal may speak for."""

    def __init__(
        self, settings: TenantSettings, for_all_tenants: frozenset[str] = frozenset()
    ) -> None:
        """Makes the policy.

        Args:
            settings: which tenants there are.
            for_all_tenants: full names of the RPCs that admins may call with tenant ``*``.
        """
        self._for_all_tenants = for_all_tenants
        self._known = frozenset(settings.known) if settings.strict else None
        self._reserved = frozenset(settings.reserved)
        self._proven: set[tuple[Principal, str]] = set()

    def before(self, group: Group) -> None:
        """Checks the tenant, or fills in the only one the principal is bound to.

        Raises:
            InvalidRequestError: the tenant is missing or malformed.
            MeshError: PERMISSION_DENIED; the tenant is another's, or not known here.
        """
        call = group.call
        if (call.principal, call.tenant) in self._proven:
            return
        if call.tenant == ANY_TENANT and call.method in self._for_all_tenants:
            _admit_to_all(call)
            return
        if not call.tenant:
            call.tenant = call.principal.only_tenant
        if not call.tenant:
            raise InvalidRequestError(
                [Violation(_field(call.streamed), f"is missing; {TENANT_RULE}")]
            )
        if TENANT_PATTERN.fullmatch(call.tenant) is None:
            raise InvalidRequestError([Violation(_field(call.streamed), TENANT_RULE)])
        if not call.principal.may_speak_for(call.tenant):
            raise MeshError(
                grpc.StatusCode.PERMISSION_DENIED,
                "TENANT_NOT_ALLOWED",
                f"key {call.principal.name!r} may not speak for tenant {call.tenant!r}",
                metadata={"tenant": call.tenant},
            )
        if call.tenant in self._reserved and not (call.principal.service or call.principal.admin):
            raise MeshError(
                grpc.StatusCode.PERMISSION_DENIED,
                "TENANT_RESERVED",
                f"tenant {call.tenant!r} is nobody's (tenants.reserved); call as another tenant",
                metadata={"tenant": call.tenant},
            )
        if self._known is not None and call.tenant not in self._known:
            raise MeshError(
                grpc.StatusCode.PERMISSION_DENIED,
                "TENANT_UNKNOWN",
                f"tenant {call.tenant!r} is not known here and tenants.strict is set",
                metadata={"tenant": call.tenant},
            )
        if len(self._proven) >= _MAX_PROVEN:
            self._proven.clear()
        self._proven.add((call.principal, call.tenant))

    def after(self, group: Group, code: grpc.StatusCode, count: int, duration_s: float) -> None:
        """Nothing."""


_MAX_PROVEN: Final = 10_000


def _admit_to_all(call: Call) -> None:
    principal = call.principal
    if not (principal.admin and principal.may_speak_for(ANY_TENANT)):
        raise MeshError(
            grpc.StatusCode.PERMISSION_DENIED,
            "TENANT_NOT_ALLOWED",
            f"key {principal.name!r} may not ask about all tenants: it must be an admin's and "
            "bound to '*'",
            metadata={"tenant": ANY_TENANT},
        )
    call.all_tenants = True
    call.tenant = MESH_TENANT


def hash_key(key: str) -> str:
    """SHA-256 of an API key in hexadecimal, as the configuration holds it."""
    return hashlib.sha256(key.encode()).hexdigest()


def _principal(key: ApiKey) -> Principal:
    return Principal(key.name, frozenset(key.tenants), service=key.service, admin=key.admin)


def _field(streamed: bool) -> str:
    return "context.tenant" if streamed else "metadata x-agent360-tenant"


def _unauthenticated(reason: str, message: str) -> MeshError:
    return MeshError(grpc.StatusCode.UNAUTHENTICATED, reason, message)
