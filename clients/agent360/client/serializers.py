"""How values become the bytes of entries, and values again."""

from __future__ import annotations

import functools
from typing import Any, Final, Generic, Protocol, TypeVar, cast, get_args

import msgspec

T = TypeVar("T")


class Serializer(Protocol[T]):
    """Turns values of one type into bytes and back.

    Example:
        >>> class Upper:
        ...     content_type = "text/plain"
        ...     def encode(self, value: str) -> bytes:
        ...         return value.upper().encode()
        ...     def decode(self, data: bytes) -> str:
        ...         return data.decode()
    """

    @property
    def content_type(self) -> str:
        """Media type of the bytes; empty: not stated."""

    def encode(self, value: T) -> bytes:
        """The bytes of a value.

        Raises:
            TypeError: the value is not of the type.
        """

    def decode(self, data: bytes) -> T:
        """The value of bytes; whatever it raises says that they are not a value of the type."""


class _Bytes:
    content_type = ""

    def encode(self, value: bytes) -> bytes:
        if not isinstance(value, bytes):
            raise TypeError(f"a value of type {type(value).__name__} needs a serializer")
        return value

    def decode(self, data: bytes) -> bytes:
        return data


class _Text:
    content_type = "text/plain; charset=utf-8"

    def encode(self, value: str) -> bytes:
        if not isinstance(value, str):
            raise TypeError(f"a value of type {type(value).__name__} is not text")
        return value.encode()

    def decode(self, data: bytes) -> str:
        return data.decode()


class _Json(Generic[T]):
    content_type = "application/json"

    def __init__(self, kind: type[T]) -> None:
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(kind)

    def encode(self, value: T) -> bytes:
        return self._encoder.encode(value)

    def decode(self, data: bytes) -> T:
        return self._decoder.decode(data)


class _Pydantic(Generic[T]):
    content_type = "application/json"

    def __init__(self, kind: type[T]) -> None:
        from pydantic import TypeAdapter  # noqa: PLC0415 - only a program that has it comes here

        self._adapter = TypeAdapter(kind)

    def encode(self, value: T) -> bytes:
        return self._adapter.dump_json(value)

    def decode(self, data: bytes) -> T:
        return self._adapter.validate_json(data)


BYTES: Final[Serializer[bytes]] = _Bytes()
"""Bytes as they are."""
TEXT: Final[Serializer[str]] = _Text()
"""Text as UTF-8."""
UNCHANGED: Final[Serializer[Any]] = BYTES
"""``BYTES``, as the default of a parameter for a serializer of any type."""


def json_of(kind: type[T]) -> Serializer[T]:
    """JSON of a type that msgspec knows: built-in types, dataclasses, Structs, and so on.

    Raises:
        TypeError: msgspec does not know the type.

    Example:
        >>> json_of(dict[str, int]).decode(b'{"a": 1}')
        {'a': 1}
    """
    return cast("Serializer[T]", _made(_Json, kind))


def pydantic_of(kind: type[T]) -> Serializer[T]:
    """JSON of a type that pydantic validates.

    Raises:
        ImportError: the program has no pydantic.

    Example:
        >>> pydantic_of(list[Plan]).encode([Plan(steps=3)])
        b'[{"steps":3}]'
    """
    return cast("Serializer[T]", _made(_Pydantic, kind))


def serializer_for(annotation: Any) -> Serializer[Any]:
    """The serializer of what a function with this return annotation returns.

    Raises:
        TypeError: no serializer knows the type.
    """
    if annotation is bytes:
        return BYTES
    if annotation is str:
        return TEXT
    return pydantic_of(annotation) if _is_of_pydantic(annotation) else json_of(annotation)


def _is_of_pydantic(annotation: Any) -> bool:
    """Whether a type, or one that it is made of, is a class of pydantic's making."""
    if isinstance(annotation, type) and hasattr(annotation, "__pydantic_core_schema__"):
        return True
    return any(map(_is_of_pydantic, get_args(annotation)))


def _made(serializer: Any, kind: Any) -> Any:
    """A serializer of a type; the same one each time, where the type allows it."""
    try:
        hash(kind)
    except TypeError:
        return serializer(kind)
    return _known(serializer, kind)


@functools.lru_cache(maxsize=1_024, typed=True)
def _known(serializer: Any, kind: Any) -> Any:
    return serializer(kind)
