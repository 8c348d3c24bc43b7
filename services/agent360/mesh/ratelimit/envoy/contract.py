"""The part of Envoy's contract that is served: envoy/service/ratelimit/v3/rls.proto.

The messages are built here, in a descriptor pool of their own: PyPI's xds-protos overwrites files
of opentelemetry-proto and googleapis-common-protos where it is installed beside them, and messages
in the common pool would clash with the stubs of a process that has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from google.protobuf import descriptor_pb2, duration_pb2, wrappers_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_PACKAGE: Final = "envoy.service.ratelimit.v3"
_DESCRIPTOR: Final = ".envoy.extensions.common.ratelimit.v3.RateLimitDescriptor"
_RESPONSE: Final = f".{_PACKAGE}.RateLimitResponse"

_UNITS: Final = {
    "UNKNOWN": 0, "SECOND": 1, "MINUTE": 2, "HOUR": 3, "DAY": 4, "MONTH": 5, "YEAR": 6, "WEEK": 7,
}  # fmt: skip

_OVERRIDE_UNITS: Final = {name: number for name, number in _UNITS.items() if name != "WEEK"}

# Messages by their path: fields by name, with number and type; a type that begins with a dot is a
# message, one with "enum " before it an enum, "*" after it: repeated.
_FILES: Final[dict[str, dict[str, dict[str, tuple[int, str]]]]] = {
    "envoy.type.v3": {},
    "envoy.config.core.v3": {
        "HeaderValue": {"key": (1, "string"), "value": (2, "string")},
    },
    "envoy.extensions.common.ratelimit.v3": {
        "RateLimitDescriptor": {
            "entries": (1, f"{_DESCRIPTOR}.Entry*"),
            "limit": (2, f"{_DESCRIPTOR}.RateLimitOverride"),
            "hits_addend": (3, ".google.protobuf.UInt64Value"),
        },
        "RateLimitDescriptor.Entry": {"key": (1, "string"), "value": (2, "string")},
        "RateLimitDescriptor.RateLimitOverride": {
            "requests_per_unit": (1, "uint32"),
            "unit": (2, "enum .envoy.type.v3.RateLimitUnit"),
        },
    },
    _PACKAGE: {
        "RateLimitRequest": {
            "domain": (1, "string"),
            "descriptors": (2, f"{_DESCRIPTOR}*"),
            "hits_addend": (3, "uint32"),
        },
        "RateLimitResponse": {
            "overall_code": (1, f"enum {_RESPONSE}.Code"),
            "statuses": (2, f"{_RESPONSE}.DescriptorStatus*"),
            "response_headers_to_add": (3, ".envoy.config.core.v3.HeaderValue*"),
        },
        "RateLimitResponse.RateLimit": {
            "requests_per_unit": (1, "uint32"),
            "unit": (2, f"enum {_RESPONSE}.RateLimit.Unit"),
            "name": (3, "string"),
        },
        "RateLimitResponse.DescriptorStatus": {
            "code": (1, f"enum {_RESPONSE}.Code"),
            "current_limit": (2, f"{_RESPONSE}.RateLimit"),
            "limit_remaining": (3, "uint32"),
            "duration_until_reset": (4, ".google.protobuf.Duration"),
        },
    },
}
# Enums by the message they are in, or the package.
_ENUMS: Final = {
    "envoy.type.v3": ("RateLimitUnit", _OVERRIDE_UNITS),
    "RateLimitResponse": ("Code", {"UNKNOWN": 0, "OK": 1, "OVER_LIMIT": 2}),
    "RateLimitResponse.RateLimit": ("Unit", _UNITS),
}
_TYPES: Final = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "uint32": descriptor_pb2.FieldDescriptorProto.TYPE_UINT32,
}


def _build() -> DescriptorPool:
    pool = DescriptorPool()
    for known in (duration_pb2, wrappers_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    before = ["google/protobuf/duration.proto", "google/protobuf/wrappers.proto"]
    for package, messages in _FILES.items():
        file = descriptor_pb2.FileDescriptorProto(
            name=f"{package.replace('.', '/')}.proto", package=package, syntax="proto3"
        )
        file.dependency.extend(before)
        before.append(file.name)
        made: dict[str, Any] = {"": file.message_type}
        for path, fields in messages.items():
            parent, _, name = path.rpartition(".")
            message = made[parent].add(name=name)
            made[path] = message.nested_type
            for field, (number, kind) in fields.items():
                _add_field(message, field, number, kind)
            if path in _ENUMS:
                _add_enum(message, *_ENUMS[path])
        if package in _ENUMS:
            _add_enum(file, *_ENUMS[package])
        if package == _PACKAGE:
            file.service.add(name="RateLimitService").method.add(
                name="ShouldRateLimit",
                input_type=f".{_PACKAGE}.RateLimitRequest",
                output_type=_RESPONSE,
            )
        pool.AddSerializedFile(file.SerializeToString())
    return pool


def _add_enum(scope: Any, name: str, values: Mapping[str, int]) -> None:
    declared = scope.enum_type.add(name=name)
    for value, number in values.items():
        declared.value.add(name=value, number=number)


def _add_field(message: Any, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number)
    repeated = kind.endswith("*")
    kind = kind.removesuffix("*")
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    if kind.startswith("."):
        field.type, field.type_name = field.TYPE_MESSAGE, kind
    elif kind.startswith("enum "):
        field.type, field.type_name = field.TYPE_ENUM, kind.removeprefix("enum ")
    else:
        field.type = _TYPES[kind]


_POOL: Final = _build()

SERVICE: Final[ServiceDescriptor] = _POOL.FindServiceByName(f"{_PACKAGE}.RateLimitService")
"""The gRPC service."""
RateLimitResponse: Final[Any] = GetMessageClass(
    _POOL.FindMessageTypeByName(f"{_PACKAGE}.RateLimitResponse")
)
"""Its answer."""
OK: Final = 1
OVER_LIMIT: Final = 2
UNITS: Final = _UNITS
"""Units of a limit in the answer, by name."""
UNIT_NAMES: Final = {number: name for name, number in _UNITS.items()}
"""The same by number; of the limit in a descriptor, too, which has no weeks as yet."""
