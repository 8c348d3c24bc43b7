"""The agent360-mesh command."""
