"""The keys of cached functions' results, made of the functions' arguments."""

from __future__ import annotations

import hashlib
import inspect
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

LONGEST_PLAIN: Final = 200
"""A longer text of arguments is hashed, in characters."""

_CANNOT: Final = (TypeError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of one call."""

    args: tuple[Any, ...]
    """Those without a name."""
    kwargs: Mapping[str, Any]
    """Those with a name."""
    by_name: dict[str, Any]
    """All, with defaults, by the names of their parameters."""


@dataclass(frozen=True, slots=True)
class KeyMaker:
    """Makes the keys of one function's results."""

    signature: inspect.Signature
    """Of the function."""
    key: Callable[[Arguments], str]
    """The key for arguments."""

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments of a call.

        Raises:
            TypeError: they do not fit the function.
        """
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Arguments(args, kwargs, bound.arguments)


def key_maker(
    function: Callable[..., Any], key: str | Callable[..., str] | None, ignore: Sequence[str]
) -> KeyMaker:
    """Makes the maker of a function's keys.

    Args:
        function: whose results are cached.
        key: a template, a function of the arguments, or None for a key of all arguments.
        ignore: arguments left out of a key of all arguments.

    Raises:
        TypeError: the template or ``ignore`` names no argument of the function.
    """
    signature = inspect.signature(function)
    if key is None:
        _check_names(function, signature, ignore)
        return KeyMaker(signature, _automatic(function, frozenset(ignore)))
    if ignore:
        raise TypeError("ignore goes with keys that are made of all arguments")
    if isinstance(key, str):
        return KeyMaker(signature, _template(function, signature, key))
    make = key
    return KeyMaker(signature, lambda arguments: make(*arguments.args, **arguments.kwargs))


def templates(
    function: Callable[..., Any], texts: Sequence[str]
) -> Callable[[Arguments], Sequence[str]]:
    """Fills several templates at a time."""
    signature = inspect.signature(function)
    if not any("{" in text or "}" in text for text in texts):
        return lambda _: texts
    makers = [_template(function, signature, text) for text in texts]
    return lambda arguments: tuple(make(arguments) for make in makers)


def _template(
    function: Callable[..., Any], signature: inspect.Signature, template: str
) -> Callable[[Arguments], str]:
    names = []
    for _, field, _, _ in string.Formatter().parse(template):
        if field is not None:
            names.append(field.partition(".")[0].partition("[")[0])
    if any(not name or name.isdigit() for name in names):
        raise TypeError(f"name the arguments in the template {template!r}")
    _check_names(function, signature, names)
    return lambda arguments: template.format_map(arguments.by_name)


def _automatic(function: Callable[..., Any], ignored: frozenset[str]) -> Callable[[Arguments], str]:
    name = f"{function.__module__}.{function.__qualname__}"

    def make(arguments: Arguments) -> str:
        named = {key: value for key, value in arguments.by_name.items() if key not in ignored}
        return f"{name}:{_text_of(name, named)}"

    return make


def _text_of(function: str, arguments: dict[str, Any]) -> str:
    """The arguments as JSON or, where that is long or would mix up types, a hash of them."""
    try:
        exact, text = _EXACT.encode(arguments), _JSON.encode(arguments)
    except _CANNOT:
        raise _unencodable(function, arguments) from None
    if len(text) <= LONGEST_PLAIN and msgspec.msgpack.decode(exact) == msgspec.json.decode(text):
        return text.decode()
    return hashlib.sha256(exact).hexdigest()


def _unencodable(function: str, arguments: dict[str, Any]) -> TypeError:
    for name, value in arguments.items():
        try:
            _EXACT.encode(value)
            _JSON.encode(value)
        except _CANNOT as error:
            return TypeError(
                f"argument {name!r} of {function} cannot be part of a key ({error}); "
                f"give a key, or ignore=({name!r},)"
            )
    return TypeError(f"the arguments of {function} cannot be part of a key")


def _plain(value: Any) -> Any:
    """What stands for a value that msgspec does not know: pydantic's models know their content."""
    dump = getattr(type(value), "model_dump", None)
    if dump is None:
        raise TypeError(f"{type(value).__qualname__} has no stable form")
    return dump(value, mode="json")


_JSON: Final = msgspec.json.Encoder(order="deterministic", enc_hook=_plain)
_EXACT: Final = msgspec.msgpack.Encoder(order="deterministic", enc_hook=_plain)


def _check_names(
    function: Callable[..., Any], signature: inspect.Signature, names: Sequence[str]
) -> None:
    for name in names:
        if name not in signature.parameters:
            raise TypeError(f"{function.__qualname__} has no argument {name!r}")
