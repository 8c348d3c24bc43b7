"""Pages of lists: page sizes, opaque page tokens bound to the tenant and the query, read masks."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
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


def decode_place(tenant: str, query: bytes, token: str) -> tuple[int, str] | None:
    """As ``decode_page_token``, of lists whose position is a number of 64 bits and a text."""
    match decode_page_token(tenant, query, token):
        case None if not token:
            return None
        case [int(number), str(text)] if abs(number) < 1 << 63:
            return number, text
        case _:
            raise InvalidRequestError([Violation("page_token", "is not a token of this service")])


def read_mask(request: Any, message_class: type[M]) -> Callable[[M], M]:
    """Reads the mask of a request; what it returns keeps of a message only what the mask names.

    Without a mask that is everything.

    Raises:
        InvalidRequestError: a path is not a field of the messages.
    """
    mask: FieldMask = request.read_mask
    if not request.HasField("read_mask") or not mask.paths or "*" in mask.paths:
        return lambda message: message
    described: Any = message_class.DESCRIPTOR
    unknown = [
        path for path in mask.paths if not FieldMask(paths=[path]).IsValidForDescriptor(described)
    ]
    if unknown:
        raise InvalidRequestError(
            [
                Violation("read_mask", f"{path!r} is not a field of {described.name}")
                for path in unknown
            ]
        )

    def masked(message: M) -> M:
        kept = message_class()
        mask.MergeMessage(message, kept)
        return kept

    return masked


def _fingerprint(tenant: str, query: bytes) -> str:
    digest = hashlib.blake2b(
        tenant.encode() + b"\0" + query, digest_size=9, key=b"agent360 page token"
    )
    return base64.urlsafe_b64encode(digest.digest()).decode()
