"""What an Agent360 component imports to call the mesh.

Example:
    >>> async with Mesh.connect(tenant="acme") as mesh:
    ...     lookup = await mesh.cache.get("plan:42")
"""

from agent360.client.alerts import alert_rule
from agent360.client.audit import AuditEvent
from agent360.client.cache import CacheClient
from agent360.client.cached_functions import cached
from agent360.client.channel import Tls
from agent360.client.chat import Answer, AnswerSource, GenerateRequest, Message, Tool, ToolCall
from agent360.client.context import CallScope, Priority, call_scope
from agent360.client.decisions import CheckRequest, Decision
from agent360.client.entries import Entry, Lookup, Outcome
from agent360.client.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MeshError,
    RateLimitedError,
    UnavailableError,
    Violation,
)
from agent360.client.inference import InferenceClient
from agent360.client.limiting import LimitMiddleware, limit
from agent360.client.mesh import Mesh
from agent360.client.metric_queries import LabelMatch, MetricGroup, Point, metric_query
from agent360.client.near import NearCache
from agent360.client.ratelimit import RateLimitClient
from agent360.client.serializers import BYTES, TEXT, Serializer, json_of, pydantic_of
from agent360.client.synchronous import SyncMesh
from agent360.client.watching import Invalidation, Reset

__all__ = [
    "BYTES",
    "TEXT",
    "Answer",
    "AnswerSource",
    "AuditEvent",
    "CacheClient",
    "CallScope",
    "CheckRequest",
    "DeadlineExceededError",
    "Decision",
    "Entry",
    "GenerateRequest",
    "InferenceClient",
    "InvalidRequestError",
    "Invalidation",
    "LabelMatch",
    "LimitMiddleware",
    "Lookup",
    "Mesh",
    "MeshError",
    "Message",
    "MetricGroup",
    "NearCache",
    "Outcome",
    "Point",
    "Priority",
    "RateLimitClient",
    "RateLimitedError",
    "Reset",
    "Serializer",
    "SyncMesh",
    "Tls",
    "Tool",
    "ToolCall",
    "UnavailableError",
    "Violation",
    "alert_rule",
    "cached",
    "call_scope",
    "json_of",
    "limit",
    "metric_query",
    "pydantic_of",
]
