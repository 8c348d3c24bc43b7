"""Answers that are kept: by which name, for whom and for how long."""
