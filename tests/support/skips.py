"""Why a test may be skipped on some machines without failing the run in strict mode."""

from typing import Final

NO_PODMAN: Final = "podman is not at hand"
NO_BASE_IMAGE: Final = "no base image for containers can be had on this machine"
NO_CONTAINERS: Final = "this machine does not let podman run containers"
NO_CASSANDRA: Final = "Cassandra is not at hand: scripts/cassandra.sh install says why"
NO_OTHER_ADDRESS: Final = "this machine has no address beyond loopback"

EXPECTED: Final = frozenset(
    {NO_PODMAN, NO_BASE_IMAGE, NO_CONTAINERS, NO_CASSANDRA, NO_OTHER_ADDRESS}
)
