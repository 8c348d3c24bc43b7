"""Benchmarks: what a call of the mesh costs beside a bare gRPC server, in one run."""
