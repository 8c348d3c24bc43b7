"""OpenTelemetry's metrics protocol (OTLP 1.x over gRPC), served beside our own."""

from agent360.mesh.metrics.otlp.service import OtlpService

__all__ = ["OtlpService"]
