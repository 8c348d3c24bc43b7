"""Stores of measurements and events."""
