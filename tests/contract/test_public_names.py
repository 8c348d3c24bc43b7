"""The names that others may import; one that comes or goes is changed here on purpose."""

import importlib

import pytest

PUBLIC = {
    "agent360.client": """
        Answer AnswerSource AuditEvent BYTES CacheClient CallScope CheckRequest
        DeadlineExceededError Decision Entry GenerateRequest InferenceClient InvalidRequestError
        Invalidation LabelMatch LimitMiddleware Lookup Mesh MeshError Message MetricGroup NearCache
        Outcome Point Priority RateLimitClient
        RateLimitedError Reset Serializer SyncMesh TEXT Tls Tool ToolCall UnavailableError Violation
        alert_rule cached call_scope json_of limit metric_query pydantic_of
    """,
    "agent360.mesh": "embedded embedded_sync",
    "agent360.mesh.cache": "CacheServicer CacheSettings",
    "agent360.mesh.inference": "InferenceServicer InferenceSettings",
    "agent360.mesh.metrics": "MetricsServicer MetricsSettings",
    "agent360.mesh.ratelimit": "RateLimitServicer RateLimitSettings",
    "agent360.mesh.simulator": "SimulatedModel Simulator SimulatorSettings run",
}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_exports_exactly_its_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = module.no_such_name
