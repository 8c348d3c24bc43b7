"""The Mesh: one connected client of all four services."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

from agent360.client import audit, cache, inference, logs, metrics, profiling, ratelimit
from agent360.client.addresses import parse_addresses
from agent360.client.channel import MAX_MESSAGE_BYTES, Tls
from agent360.client.coalescer import Coalescer, ConnectOptions, Wire
from agent360.client.near import Near, NearCache
from agent360.client.reporter import Reporter
from agent360.client.session import Bounds

DEFAULT_ADDRESSES: Final = {
    "inference": "127.0.0.1:7360",
    "cache": "127.0.0.1:7361",
    "ratelimit": "127.0.0.1:7362",
    "metrics": "127.0.0.1:7363",
}
"""Where the services listen unless told otherwise."""

Addresses = str | Sequence[str]


class Mesh:
    """A connection to the four services, for one event loop.

    Connecting is lazy: a stream is opened by the first call to a service. One Mesh is meant to be
    shared by all tasks of a process; calls of many tasks go out together.

    Example:
        >>> async with Mesh.connect(tenant="acme") as mesh:
        ...     answer = await mesh.inference.generate("Say hello.")
        ...     print(answer.text)

    Attributes:
        cache: the cache service.
        ratelimit: the ratelimit service.
        inference: the inference service.
        metrics: measurements: reported in the background, and queried.
        audit: audit events.
        logs: what the services logged.
        profiling: profiles of running services.
    """

    def __init__(
        self,
        addresses: dict[str, tuple[str, ...]],
        options: ConnectOptions,
        reporter_id: str = "",
        near_cache: NearCache | None = None,
    ) -> None:
        """Use ``Mesh.connect``."""
        self.options = options

        def coalescer(service: str, wire: Wire) -> Coalescer:
            return Coalescer(wire, addresses[service], options)

        self._coalescers = (
            coalescer("cache", cache.WIRE),
            coalescer("ratelimit", ratelimit.WIRE),
            coalescer("inference", inference.WIRE),
            coalescer("metrics", audit.WIRE),
            coalescer("metrics", metrics.WIRE),
            coalescer("metrics", logs.WIRE),
        )
        near = Near(self._coalescers[0], near_cache) if near_cache is not None else None
        self.cache = cache.CacheClient(self._coalescers[0], near)
        self.ratelimit = ratelimit.RateLimitClient(self._coalescers[1])
        self.inference = inference.InferenceClient(self._coalescers[2])
        self.audit = audit.AuditClient(self._coalescers[3])
        names = ("cache", "ratelimit", "inference", "metrics")
        self.profiling = profiling.ProfilingClient(
            dict(zip(names, self._coalescers, strict=False)), options
        )
        self._reporter = Reporter(
            self._coalescers[4].channel, options.metadata, reporter_id=reporter_id
        )
        self.metrics = metrics.MetricsClient(self._reporter, self._coalescers[4], options.tenant)
        self.logs = logs.LogsClient(self._coalescers[5])

    @classmethod
    def connect(
        cls,
        *,
        inference: Addresses | None = None,
        cache: Addresses | None = None,
        ratelimit: Addresses | None = None,
        metrics: Addresses | None = None,
        tenant: str = "",
        api_key: str | None = None,
        tls: Tls | None = None,
        default_timeout: float = 10.0,
        patience: float = 3.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        bounds: Bounds | None = None,
        near_cache: NearCache | None = None,
    ) -> Self:
        """Makes a Mesh; must be called while an event loop runs.

        Addresses are ``host:port``, several as a sequence or separated by commas. One that is not
        given is taken from the environment (``AGENT360_INFERENCE_ADDRESS`` and so on), else it is
        the service's default port on loopback.

        Args:
            inference: of the inference service.
            cache: of the cache service.
            ratelimit: of the ratelimit service.
            metrics: of the metrics service.
            tenant: on whose behalf calls are made unless they say otherwise.
            api_key: proves who is calling; None: ``AGENT360_API_KEY``, if it is set.
            tls: None: plaintext, which only servers on loopback accept by default.
            default_timeout: seconds, for calls that name no timeout.
            patience: seconds that calls wait for a service that cannot be reached before they
                fail at once.
            max_message_bytes: largest message; must not exceed the servers'.
            bounds: of messages and of what is in flight.
            near_cache: keeps entries that were read lately in this process; None: does not.

        Raises:
            ValueError: an address is malformed.
        """
        given = {
            "inference": inference,
            "cache": cache,
            "ratelimit": ratelimit,
            "metrics": metrics,
        }
        addresses = {
            service: parse_addresses(
                value
                or os.environ.get(f"AGENT360_{service.upper()}_ADDRESS")
                or DEFAULT_ADDRESSES[service]
            )
            for service, value in given.items()
        }
        options = ConnectOptions(
            tenant=tenant,
            api_key=os.environ.get("AGENT360_API_KEY", "") if api_key is None else api_key,
            tls=tls,
            default_timeout_s=default_timeout,
            patience_s=patience,
            max_message_bytes=max_message_bytes,
            bounds=bounds or Bounds(),
        )
        return cls(addresses, options, near_cache=near_cache)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self, grace: float = 1.0) -> None:
        """Reports what was measured, waits for what is in flight, and closes all connections.

        Args:
            grace: seconds that both may take together; then the rest fails with UNAVAILABLE.
        """
        await asyncio.gather(
            self._reporter.close(grace),
            self.audit.settle(grace),
            self.cache.settle(grace),
            self.ratelimit.settle_leases(grace),
        )
        await asyncio.gather(*(coalescer.close(grace) for coalescer in self._coalescers))
