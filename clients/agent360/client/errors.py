"""The one error tree of the mesh, and its form on the wire: a canonical code with details."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

DOMAIN: Final = "agent360.mesh"
"""The ErrorInfo domain of every error that the mesh itself raises."""

STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"
"""Trailing metadata that carries a serialized google.rpc.Status."""

_CODE_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing wrong with a request."""

    field: str
    """Path of the field, such as ``entry.ttl`` or ``messages[3].role``."""
    description: str
    """What is wrong and what would be right."""


class QuotaViolation(NamedTuple):
    """A limit that was exceeded."""

    subject: str
    """Whose limit, such as ``tenant:acme``."""
    description: str
    """Which limit, and how it was exceeded."""


class MeshError(Exception):
    """An error of the mesh. Raised by the client, and by services to answer a call with it.

    Example:
        >>> try:
        ...     raise MeshError(grpc.StatusCode.NOT_FOUND, "MODEL_UNKNOWN", "there is no model 'x'")
        ... except MeshError as error:
        ...     error.reason
        'MODEL_UNKNOWN'

    Attributes:
        code: the canonical gRPC code.
        reason: UPPER_SNAKE_CASE constant to branch on; see docs/errors.md.
        message: one sentence for people.
        metadata: more facts, by name.
        retry_after_s: seconds after which a repetition can succeed; None if not known.
        violations: what is wrong with the request, for INVALID_ARGUMENT.
        quotas: exceeded limits, for RESOURCE_EXHAUSTED.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        violations: Sequence[Violation] = (),
        quotas: Sequence[QuotaViolation] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = metadata or {}
        self.retry_after_s = retry_after_s
        self.violations = tuple(violations)
        self.quotas = tuple(quotas)

    def __str__(self) -> str:
        return f"{self.code.name} {self.reason}: {self.message}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.to_status().SerializeToString(),))

    def to_status(self) -> status_pb2.Status:
        """The error as google.rpc.Status, with ErrorInfo and the details that apply."""
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        info = error_details_pb2.ErrorInfo(
            reason=self.reason, domain=DOMAIN, metadata=dict(self.metadata)
        )
        status.details.add().Pack(info)
        if self.violations:
            bad = error_details_pb2.BadRequest()
            for violation in self.violations:
                bad.field_violations.add(field=violation.field, description=violation.description)
            status.details.add().Pack(bad)
        if self.quotas:
            failure = error_details_pb2.QuotaFailure()
            for quota in self.quotas:
                failure.violations.add(subject=quota.subject, description=quota.description)
            status.details.add().Pack(failure)
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(max(0, round(self.retry_after_s * 1e9)))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        return status


class InvalidRequestError(MeshError):
    """The request is malformed; ``violations`` names every fault by its field path."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        found = tuple(violations)
        text = "; ".join(f"{each.field}: {each.description}" for each in found)
        super().__init__(
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", text, violations=found
        )


class DeadlineExceededError(MeshError, TimeoutError):
    """The call's deadline passed before its answer arrived, or is sure to."""

    def __init__(
        self,
        message: str = "the deadline passed before the answer arrived",
        *,
        reason: str = "DEADLINE_EXCEEDED",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            reason,
            message,
            metadata=metadata,
            retry_after_s=retry_after_s,
        )


class UnavailableError(MeshError, ConnectionError):
    """The service could not be reached, or the connection broke before the answer arrived."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "UNAVAILABLE",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            grpc.StatusCode.UNAVAILABLE,
            reason,
            message,
            metadata=metadata,
            retry_after_s=retry_after_s,
        )


class RateLimitedError(MeshError):
    """A limit denied the call; ``retry_after_s`` says when to try again."""

    def __init__(
        self,
        message: str,
        *,
        reason: str = "RATE_LIMITED",
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        quotas: Sequence[QuotaViolation] = (),
    ) -> None:
        super().__init__(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            reason,
            message,
            metadata=metadata,
            retry_after_s=retry_after_s,
            quotas=quotas,
        )


def unimplemented(feature: str) -> MeshError:
    """The error of an RPC or option that the contract names and the service does not have yet."""
    return MeshError(
        grpc.StatusCode.UNIMPLEMENTED,
        "FEATURE_NOT_IMPLEMENTED",
        f"this version of the service does not implement {feature}",
        metadata={"feature": feature},
    )


def from_status(status: status_pb2.Status) -> MeshError:
    """The error that a google.rpc.Status describes; the most specific class that fits."""
    reason, metadata = code_pb2.Code.Name(status.code), {}
    violations: list[Violation] = []
    quotas: list[QuotaViolation] = []
    retry_after_s = None
    for detail in status.details:
        match _unpack(detail):
            case error_details_pb2.ErrorInfo() as info:
                reason, metadata = info.reason, dict(info.metadata)
            case error_details_pb2.BadRequest() as bad:
                violations += [Violation(v.field, v.description) for v in bad.field_violations]
            case error_details_pb2.QuotaFailure() as failure:
                quotas += [QuotaViolation(v.subject, v.description) for v in failure.violations]
            case error_details_pb2.RetryInfo() as retry:
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)
    if violations and code is grpc.StatusCode.INVALID_ARGUMENT and reason == "INVALID_REQUEST":
        return InvalidRequestError(violations)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(
            status.message, reason=reason, metadata=metadata, retry_after_s=retry_after_s
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(
            status.message, reason=reason, metadata=metadata, retry_after_s=retry_after_s
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and quotas:
        return RateLimitedError(
            status.message,
            reason=reason,
            metadata=metadata,
            retry_after_s=retry_after_s,
            quotas=quotas,
        )
    return MeshError(
        code,
        reason,
        status.message,
        metadata=metadata,
        retry_after_s=retry_after_s,
        violations=violations,
        quotas=quotas,
    )


def from_rpc_error(error: grpc.RpcError) -> MeshError:
    """The error that a failed unary or streaming RPC describes."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return UnavailableError(str(error))
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(value))
            except DecodeError:
                break
    return from_status(status_pb2.Status(code=error.code().value[0], message=error.details() or ""))


def _unpack(detail: any_pb2.Any) -> object:
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.QuotaFailure,
        error_details_pb2.RetryInfo,
    ):
        if detail.Is(kind.DESCRIPTOR):  # type: ignore[arg-type]  # upb's own descriptor class
            message = kind()
            detail.Unpack(message)
            return message
    return None


def _rebuild(status: bytes) -> MeshError:
    return from_status(status_pb2.Status.FromString(status))
