"""Drives ShouldRateLimit with Envoy's own stubs, in a process that has them; see the test."""

import json
import sys
from typing import Any

import grpc
from envoy.extensions.common.ratelimit.v3 import ratelimit_pb2
from envoy.service.ratelimit.v3 import rls_pb2, rls_pb2_grpc
from envoy.type.v3 import ratelimit_unit_pb2
from google.protobuf.json_format import MessageToDict


def descriptor(
    entries: dict[str, str] | list[list[str]],
    hits: int | None = None,
    limit: list[Any] | None = None,
) -> ratelimit_pb2.RateLimitDescriptor:
    pairs = entries.items() if isinstance(entries, dict) else entries
    made = ratelimit_pb2.RateLimitDescriptor(
        entries=[
            ratelimit_pb2.RateLimitDescriptor.Entry(key=key, value=value) for key, value in pairs
        ]
    )
    if hits is not None:
        made.hits_addend.value = hits
    if limit is not None:
        made.limit.requests_per_unit = limit[0]
        made.limit.unit = ratelimit_unit_pb2.RateLimitUnit.Value(limit[1])
    return made


with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = rls_pb2_grpc.RateLimitServiceStub(channel)
    for line in sys.stdin:
        asked = json.loads(line)
        request = rls_pb2.RateLimitRequest(
            domain=asked["domain"],
            hits_addend=asked.get("hits", 0),
            descriptors=[descriptor(*each) for each in asked["descriptors"]],
        )
        try:
            metadata = tuple(asked.get("metadata", {}).items())
            response = stub.ShouldRateLimit(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            answer = {"error": error.code().name, "details": error.details()}
            print(json.dumps(answer), flush=True)
        else:
            print(json.dumps(MessageToDict(response)), flush=True)
