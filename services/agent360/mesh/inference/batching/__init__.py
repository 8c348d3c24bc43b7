"""Batches of requests of several callers in one call of a backend."""
