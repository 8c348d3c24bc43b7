"""Audit events: recorded in chains of hashes, listed, verified."""
