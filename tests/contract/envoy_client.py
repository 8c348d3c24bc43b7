"""Drives ShouldRateLimit with Envoy's own stubs, in a process that has them; see the test."""

import json
import sys

import grpc
from envoy.extensions.common.ratelimit.v3 import ratelimit_pb2
from envoy.service.ratelimit.v3 import rls_pb2, rls_pb2_grpc
from google.protobuf.json_format import MessageToDict


def descriptor(
    entries: dict[str, str], hits: int | None = None
) -> ratelimit_pb2.RateLimitDescriptor:
    made = ratelimit_pb2.RateLimitDescriptor(
        entries=[
            ratelimit_pb2.RateLimitDescriptor.Entry(key=key, value=value)
            for key, value in entries.items()
        ]
    )
    if hits is not None:
        made.hits_addend.value = hits
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
            response = stub.ShouldRateLimit(request, timeout=10)
        except grpc.RpcError as error:
            print(json.dumps({"error": error.code().name}), flush=True)
        else:
            print(json.dumps(MessageToDict(response)), flush=True)
