"""OpenTelemetry's attributes and names in the form of labels and names of series.

As the specification has it for Prometheus: what a name cannot have becomes ``_``, and the values of
attributes that then share a label are joined by ``;``.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from typing import Any, Final

_NOT_IN_LABELS: Final = re.compile(r"[^a-zA-Z0-9_]")
_NOT_IN_NAMES: Final = re.compile(r"[^a-zA-Z0-9_:]")


def name_of(text: str) -> str:
    """A metric's name: ``http.server.duration`` becomes ``http_server_duration``."""
    return _not_a_digit_first(_NOT_IN_NAMES.sub("_", text))


def labels_of(attributes: Iterable[Any]) -> dict[str, str]:
    """Labels of KeyValue messages."""
    labels: dict[str, str] = {}
    for attribute in sorted(attributes, key=lambda each: str(each.key)):
        label = _not_a_digit_first(_NOT_IN_LABELS.sub("_", attribute.key))
        text = text_of(attribute.value)
        labels[label] = f"{labels[label]};{text}" if label in labels else text
    return labels


def text_of(value: Any) -> str:
    """An AnyValue as the value of a label."""
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, separators=(",", ":"))


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return ""
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode()
    if kind == "array_value":
        return [_plain(each) for each in value.array_value.values]
    if kind == "kvlist_value":
        return {each.key: _plain(each.value) for each in value.kvlist_value.values}
    return getattr(value, kind)


def _not_a_digit_first(text: str) -> str:
    return f"_{text}" if text[:1].isdigit() else text
