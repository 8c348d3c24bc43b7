"""Which requests are tried again, and where."""

from __future__ import annotations

from typing import Any

from cassandra.policies import RetryPolicy

from agent360.mesh.metrics.stores.cassandra.counts import Counts

Decision = tuple[int, int | None]
"""What the driver is to do, and with which consistency."""


class CountedRetries(RetryPolicy):
    """Tries again, with the next node, what may be repeated: all but conditional writes."""

    def __init__(self, most: int, counts: Counts) -> None:
        self._most = most
        self._counts = counts

    def on_read_timeout(
        self,
        query: Any,
        consistency: int,
        required_responses: int,
        received_responses: int,
        data_retrieved: bool,
        retry_num: int,
    ) -> Decision:
        """See RetryPolicy."""
        return self._decided(query, consistency, retry_num)

    def on_write_timeout(
        self,
        query: Any,
        consistency: int,
        write_type: int,
        required_responses: int,
        received_responses: int,
        retry_num: int,
    ) -> Decision:
        """See RetryPolicy."""
        return self._decided(query, consistency, retry_num)

    def on_unavailable(
        self,
        query: Any,
        consistency: int,
        required_replicas: int,
        alive_replicas: int,
        retry_num: int,
    ) -> Decision:
        """See RetryPolicy."""
        return self._decided(query, consistency, retry_num)

    def on_request_error(
        self, query: Any, consistency: int, error: Any, retry_num: int
    ) -> Decision:
        """See RetryPolicy."""
        return self._decided(query, consistency, retry_num)

    def _decided(self, query: Any, consistency: int, retry_num: int) -> Decision:
        if retry_num >= self._most or not query.is_idempotent:
            return self.RETHROW, None
        self._counts.retries += 1
        return self.RETRY_NEXT_HOST, consistency
