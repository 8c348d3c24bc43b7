"""Stores of entries: in memory, and shared by replicas."""
