"""What the driver calls consistency levels, and the profile of all requests."""

from __future__ import annotations

from typing import Any, Final

from cassandra import ConsistencyLevel, cluster

_LEVELS: Any = ConsistencyLevel  # its tables are set from outside of the class

LEVELS: Final[dict[str, int]] = _LEVELS.name_to_value
"""By name."""
LEVEL_NAMES: Final[dict[int, str]] = _LEVELS.value_to_name
"""The other way round."""

_CLUSTER: Any = cluster

DEFAULT_PROFILE: Final[Any] = _CLUSTER.EXEC_PROFILE_DEFAULT
"""Names the profile that requests have if they do not say otherwise."""
