"""Whether another service answers: asked less while it does not, told of once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import grpc
import structlog

from agent360.client.errors import MeshError

_PAUSE_S: Final = 1.0
_AWAY: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class Reachability:
    """Keeps calls from waiting, one after the other, for a service that is away.

    After a failure the service is left alone for a second, then one call tries it again. The log
    is told when it goes away and when it is back, not of each failure between.

    Example:
        >>> if cache.worth_asking():
        ...     try:
        ...         lookup = await mesh.cache.get(key)
        ...     except MeshError as error:
        ...         cache.failed(error)
        ...     else:
        ...         cache.answered()
    """

    def __init__(
        self,
        service: str,
        consequence: str,
        log: structlog.stdlib.BoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._consequence = consequence
        self._log = log
        self._clock = clock
        self._away = False
        self._ask_again = 0.0
        self._told: set[str] = set()

    def worth_asking(self) -> bool:
        """Whether the next call should ask; while the service is away, one a second does."""
        if not self._away:
            return True
        now = self._clock()
        if now < self._ask_again:
            return False
        self._ask_again = now + _PAUSE_S
        return True

    def answered(self) -> None:
        """Notes an answer."""
        if self._away:
            self._away = False
            self._log.info(f"{self._service} service answers again")

    def failed(self, error: MeshError) -> None:
        """Notes that no useful answer came.

        An error that the service chose to answer with does not make it away: the next call may
        well be answered. The log is told of each kind of these once.
        """
        if error.code not in _AWAY:
            if error.reason not in self._told:
                self._told.add(error.reason)
                self._log.warning(f"{self._service} service refused a call", error=str(error))
            return
        self._ask_again = self._clock() + _PAUSE_S
        if not self._away:
            self._away = True
            self._log.warning(
                f"{self._service} service does not answer",
                consequence=self._consequence,
                error=str(error),
            )
