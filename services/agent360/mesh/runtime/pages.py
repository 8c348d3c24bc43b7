"""Pages of lists: page sizes, opaque page tokens bound to the tenant and the query, read masks."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Any, Final, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from agent360.client.errors import InvalidRequestError, Violation

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1_000

M = TypeVar("M", bound=Message)


def page_size(requested: int) -> int:
    """The page size in force: zero means the default, oversize is cut, negative is refused."""
    if requested < 0:
        raise InvalidRequestError([Violation("page_size", "must not be negative")])
    return min(requested or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def encode_page_token(tenant: str, query: bytes, position: Any) -> str:
    """A token that continues ``query`` of ``tenant`` after ``position``, a JSON value."""
    body = json.dumps([_fingerprint(tenant, query), position], separators=(",", ":"))
    return base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")


def decode_page_token(tenant: str, query: bytes, token: str) -> Any:
    """The position in a token.

    Args:
        tenant: the caller's tenant.
        query: the request's filter, serialized: the same for all pages of one list.
        token: what the caller sent; empty for the first page.

    Returns:
        The position, or None for the first page.

    Raises:
        InvalidRequestError: the token is garbled, another tenant's, or another query's.
    """
    if not token:
        return None
    try:
        padded = token + "=" * (-len(token) % 4)
        fingerprint, position = json.loads(base64.urlsafe_b64decode(padded))
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidRequestError(
            [Violation("page_token", "is not a token of this service")]
        ) from error
    if fingerprint != _fingerprint(tenant, query):
        raise InvalidRequestError(
            [Violation("page_token", "belongs to another tenant or another query")]
        )
    return position


def apply_read_mask(message: M, mask: FieldMask, present: bool) -> M:
    """Keeps only the fields that a read mask names; without a mask, all.

    Raises:
        InvalidRequestError: a path is not a field of the message.
    """
    if not present or not mask.paths or "*" in mask.paths:
        return message
    unknown = [path for path in mask.paths if not _has_path(message, path)]
    if unknown:
        name = message.DESCRIPTOR.name
        raise InvalidRequestError(
            [Violation("read_mask", f"{path!r} is not a field of {name}") for path in unknown]
        )
    kept = type(message)()
    mask.MergeMessage(message, kept)
    return kept


def _has_path(message: Message, path: str) -> bool:
    mask = FieldMask(paths=[path])
    return bool(mask.IsValidForDescriptor(message.DESCRIPTOR))  # type: ignore[arg-type]  # upb's own


def _fingerprint(tenant: str, query: bytes) -> str:
    digest = hashlib.blake2b(
        tenant.encode() + b"\0" + query, digest_size=9, key=b"agent360 page token"
    )
    return base64.urlsafe_b64encode(digest.digest()).decode()
