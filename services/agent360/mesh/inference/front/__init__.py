"""The OpenAI-compatible front door: the calls of the gRPC service in another language."""
