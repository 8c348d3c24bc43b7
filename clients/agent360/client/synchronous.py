"""The clients for code without an event loop: scripts and notebooks.

Generated from the asynchronous clients by scripts/synchronous.py; do not edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime, timedelta
from types import TracebackType
from typing import Self

from agent360.audit.v1 import audit_pb2
from agent360.cache.v1 import cache_pb2
from agent360.client.audit import AuditClient, AuditEvent
from agent360.client.cache import CacheClient, T
from agent360.client.channel import MAX_MESSAGE_BYTES, Tls
from agent360.client.chat import Answer, GenerateRequest
from agent360.client.decisions import (
    CheckRequest,
    Decision,
    Descriptor,
    Reservation,
    Settlement,
    Slot,
)
from agent360.client.entries import Claim, Entry, Invalidated, Lookup, Stored, Warmed
from agent360.client.entry_client import DEFAULT_NAMESPACE
from agent360.client.errors import MeshError
from agent360.client.inference import Embeddings, InferenceClient, TokenCount
from agent360.client.logs import LevelName, LogsClient
from agent360.client.mesh import Addresses, Mesh
from agent360.client.metric_queries import LabelMatch, MetricGroup
from agent360.client.metrics import Labels, MetricsClient
from agent360.client.near import NearCache, NearStats
from agent360.client.portal import Portal, SyncAnswerStream, SyncResults
from agent360.client.profiling import Format, Kind, ProfileFile, ProfilingClient
from agent360.client.ratelimit import RateLimitClient
from agent360.client.serializers import UNCHANGED, Serializer
from agent360.client.session import Bounds
from agent360.inference.v1 import inference_pb2
from agent360.logs.v1 import logs_pb2
from agent360.metrics.v1 import metrics_pb2
from agent360.ratelimit.v1 import ratelimit_pb2


class SyncCacheClient:
    """Reads, loads and warms entries of the caller's tenant.

    Example:
        >>> mesh.cache.set("plan:42", b"...", ttl=60)
        >>> lookup = mesh.cache.get("plan:42")
        >>> lookup.value if lookup.hit else None
        b'...'
    """

    def __init__(self, client: CacheClient, portal: Portal) -> None:
        """``SyncMesh.cache`` is one.

        Args:
            client: makes the calls.
            portal: runs them.
        """
        self._client = client
        self._portal = portal

    def get(
        self,
        key: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        allow_stale: bool = False,
        include_tags: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Lookup:
        """Reads one entry.

        Args:
            key: within the namespace; 1 to 1,024 bytes.
            namespace: groups keys; 1 to 128 bytes.
            allow_stale: whether a value past its TTL may be returned.
            include_tags: whether the entry's tags are wanted.
            timeout: seconds; None: what remains in the current scope, or the default.
            tenant: on whose behalf; None: that of the current scope, or the Mesh's.

        Raises:
            MeshError: the service could not be asked. A miss is a result, not an error.
        """
        return self._portal.run(
            self._client.get(
                key,
                namespace=namespace,
                allow_stale=allow_stale,
                include_tags=include_tags,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def peek(
        self, key: str, *, namespace: str = DEFAULT_NAMESPACE, tenant: str | None = None
    ) -> Lookup | None:
        """Reads one entry if a copy of it is near, at once.

        Args:
            key: as in ``get``.
            namespace: as in ``get``.
            tenant: as in ``get``.

        Returns:
            A fresh entry, or None where only ``get`` can tell.
        """
        return self._portal.call(self._client.peek, key, namespace=namespace, tenant=tenant)

    def set(
        self,
        key: str,
        value: bytes,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        content_type: str = "",
        tags: Sequence[str] = (),
        if_absent: bool = False,
        if_version: int | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Stored:
        """Writes one entry.

        Args:
            key: within the namespace; 1 to 1,024 bytes.
            value: may be empty; at most the service's max_value_bytes.
            namespace: groups keys; 1 to 128 bytes.
            ttl: seconds that the entry is fresh; None: the service's default.
            stale_ttl: seconds after its TTL that it may be served stale.
            content_type: media type of the value.
            tags: labels for ``invalidate``.
            if_absent: store only if there is no fresh entry.
            if_version: store only if the entry has this version.
            timeout: as in ``get``.
            tenant: as in ``get``.

        Raises:
            MeshError: the entry is not valid, or the service could not be asked.
        """
        return self._portal.run(
            self._client.set(
                key,
                value,
                namespace=namespace,
                ttl=ttl,
                stale_ttl=stale_ttl,
                content_type=content_type,
                tags=tags,
                if_absent=if_absent,
                if_version=if_version,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def delete(
        self,
        key: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> bool:
        """Removes one entry; returns whether there was one."""
        return self._portal.run(
            self._client.delete(key, namespace=namespace, timeout=timeout, tenant=tenant)
        )

    def get_many(
        self,
        keys: Iterable[str],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        allow_stale: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> SyncResults[Lookup]:
        """Reads many entries; see ``Results``."""
        return SyncResults(
            self._portal,
            self._portal.call(
                self._client.get_many,
                keys,
                namespace=namespace,
                allow_stale=allow_stale,
                timeout=timeout,
                tenant=tenant,
            ),
        )

    def set_many(
        self,
        entries: Iterable[Entry],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> SyncResults[Stored]:
        """Writes many entries; see ``Results``."""
        return SyncResults(
            self._portal,
            self._portal.call(
                self._client.set_many, entries, namespace=namespace, timeout=timeout, tenant=tenant
            ),
        )

    def claim(
        self,
        key: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        allow_stale: bool = False,
        fill_timeout: float | None = None,
        eager_refresh: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Claim:
        """Reads an entry or, where it is missing, becomes the one caller that fills it.

        All other callers wait for the fill until their deadline, or take the stale value where
        they allow it.

        Args:
            key: within the namespace.
            namespace: groups keys.
            allow_stale: whether to take a stale value instead of waiting.
            fill_timeout: seconds that the fill may take before the next caller gets the claim.
            eager_refresh: part of its TTL, above 0 and below 1, after which the first caller that
                finds a fresh entry gets the claim with it; None: as the namespace's policy says.
            timeout: as in ``get``.
            tenant: as in ``get``.
        """
        return self._portal.run(
            self._client.claim(
                key,
                namespace=namespace,
                allow_stale=allow_stale,
                fill_timeout=fill_timeout,
                eager_refresh=eager_refresh,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def fill(
        self,
        fill_token: str,
        key: str,
        value: bytes,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        content_type: str = "",
        tags: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Stored:
        """Stores the value that a claim asked for; not stored if the claim expired meanwhile."""
        return self._portal.run(
            self._client.fill(
                fill_token,
                key,
                value,
                namespace=namespace,
                ttl=ttl,
                stale_ttl=stale_ttl,
                content_type=content_type,
                tags=tags,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def fail(
        self,
        fill_token: str,
        error: MeshError,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Lookup | None:
        """Gives a claim up: the next caller that waits gets it.

        Returns:
            The stale entry that is served instead, to this caller and to those who wait, where the
            namespace's policy is fail-safe and there is one.
        """
        return self._portal.run(
            self._client.fail(fill_token, error, timeout=timeout, tenant=tenant)
        )

    def invalidate(
        self,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        keys: Sequence[str] | None = None,
        prefix: str | None = None,
        tags: Sequence[str] | None = None,
        warm: Sequence[Entry] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Invalidated:
        """Removes entries by keys, prefix or tags; without any of them, the whole namespace.

        Args:
            namespace: where.
            keys: these keys, at most 1,000.
            prefix: all keys that begin with this.
            tags: all entries with any of these tags.
            warm: at most 1,000 entries put in place of what goes; with a whole namespace they are
                there before the others go, so that no caller finds them missing.
            timeout: as in ``get``.
            tenant: as in ``get``.

        Raises:
            ValueError: more than one of keys, prefix and tags is given.
            MeshError: the service could not be asked.
        """
        return self._portal.run(
            self._client.invalidate(
                namespace=namespace,
                keys=keys,
                prefix=prefix,
                tags=tags,
                warm=warm,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def get_or_load(
        self,
        key: str,
        load: Callable[[], T],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        allow_stale: bool = True,
        eager_refresh: float | None = None,
        serializer: Serializer[T] = UNCHANGED,
        content_type: str | None = None,
        tags: Sequence[str] = (),
        fill_timeout: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> T:
        """Reads a value or, where it is missing, loads and stores it.

        Of all callers in all processes one loads; the others get its value. Those of this process
        share one flight, and get the same object: treat it as read-only. A stale value, or one that
        is to be refreshed early, is returned at once and loaded anew in the background. If the
        cache cannot be reached the value is loaded and not stored.

        Example:
            >>> mesh.cache.get_or_load("plan:42", lambda: read_plan(42), ttl=60)
            b'...'

        Args:
            key: within the namespace; 1 to 1,024 bytes.
            load: gives the value. It runs with the context variables of the first caller, but
                without its deadline, and goes on if callers leave.
            namespace: groups keys.
            ttl: seconds that the entry is fresh; None: the service's default.
            stale_ttl: seconds after its TTL that it may be served stale.
            allow_stale: whether a stale value may be returned while it is loaded anew.
            eager_refresh: part of its TTL, above 0 and below 1, after which a fresh value is
                loaded anew in the background; None: as the namespace's policy says.
            serializer: of the value; by default it is bytes.
            content_type: media type of the value; None: the serializer's.
            tags: labels for ``invalidate``.
            fill_timeout: seconds that loading may take before another process may load as well.
            timeout: seconds that this caller waits; None: what remains in the current scope, or as
                long as it takes.
            tenant: as in ``get``.

        Raises:
            DeadlineExceededError: the time was over; the flight goes on.
            MeshError: the request is not valid.
            Exception: whatever ``load`` raised, unless the service has a value to stand in.
        """
        return self._portal.run(
            self._client.get_or_load(
                key,
                self._portal.in_thread(load),
                namespace=namespace,
                ttl=ttl,
                stale_ttl=stale_ttl,
                allow_stale=allow_stale,
                eager_refresh=eager_refresh,
                serializer=serializer,
                content_type=content_type,
                tags=tags,
                fill_timeout=fill_timeout,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def warm(
        self,
        keys: Iterable[str],
        load: Callable[[str], T],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        serializer: Serializer[T] = UNCHANGED,
        content_type: str | None = None,
        tags: Sequence[str] = (),
        concurrency: int = 16,
        per_second: float | None = None,
        fill_timeout: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[Warmed]:
        """Loads the entries that are missing; yields how far it is, after each of them.

        An error fails its key alone; the first of them come with what is yielded. Keys that another
        process loads are left to it.

        Example:
            >>> for progress in mesh.cache.warm(keys, read_plan, namespace="plans"):
            ...     print(progress.warmed, "of", progress.total)

        Args:
            keys: taken as they are needed.
            load: gives the value of a key.
            namespace: groups keys.
            ttl: as in ``set``.
            stale_ttl: as in ``set``.
            serializer: of the values; by default they are bytes.
            content_type: media type of the values; None: the serializer's.
            tags: of all entries.
            concurrency: how many are loaded at a time.
            per_second: how many may be begun in a second; None: as many as there is room for.
            fill_timeout: as in ``claim``.
            timeout: seconds for each call.
            tenant: as in ``get``.
        """
        return self._portal.iterate(
            self._portal.call(
                self._client.warm,
                keys,
                self._portal.in_thread(load),
                namespace=namespace,
                ttl=ttl,
                stale_ttl=stale_ttl,
                serializer=serializer,
                content_type=content_type,
                tags=tags,
                concurrency=concurrency,
                per_second=per_second,
                fill_timeout=fill_timeout,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def warm_from(
        self,
        *,
        from_namespace: str,
        namespace: str = DEFAULT_NAMESPACE,
        per_second: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[Warmed]:
        """Copies another namespace's live entries within the service; yields how far it is.

        Args:
            from_namespace: where the entries are.
            namespace: where they go.
            per_second: entries a second; None: as fast as possible.
            timeout: seconds for all of it; None: as long as the service allows.
            tenant: as in ``get``.
        """
        return self._portal.iterate(
            self._portal.call(
                self._client.warm_from,
                from_namespace=from_namespace,
                namespace=namespace,
                per_second=per_second,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def warm_hottest(
        self,
        limit: int,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        per_second: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[Warmed]:
        """Puts the keys in place that were read most in the service's last run.

        Args:
            limit: how many; 1 to 100,000.
            namespace: as in ``warm_from``.
            per_second: as in ``warm_from``.
            timeout: as in ``warm_from``.
            tenant: as in ``get``.
        """
        return self._portal.iterate(
            self._portal.call(
                self._client.warm_hottest,
                limit,
                namespace=namespace,
                per_second=per_second,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def invalidate_and_warm(
        self,
        keys: Iterable[str],
        load: Callable[[str], T],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        serializer: Serializer[T] = UNCHANGED,
        content_type: str | None = None,
        tags: Sequence[str] = (),
        concurrency: int = 16,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Invalidated:
        """Loads entries anew, then removes all of the namespace but these.

        Nothing is removed before all is loaded. The first 1,000 entries, or as many as a message
        takes, are there before the others go; the rest is written right after.

        Args:
            keys: of the entries.
            load: gives the value of a key.
            namespace: which one.
            ttl: as in ``set``.
            stale_ttl: as in ``set``.
            serializer: of the values; by default they are bytes.
            content_type: media type of the values; None: the serializer's.
            tags: of all entries.
            concurrency: how many are loaded at a time.
            timeout: seconds for each call.
            tenant: as in ``get``.

        Raises:
            MeshError: the service could not be asked.
            Exception: whatever ``load`` raised first; then nothing was removed.
        """
        return self._portal.run(
            self._client.invalidate_and_warm(
                keys,
                self._portal.in_thread(load),
                namespace=namespace,
                ttl=ttl,
                stale_ttl=stale_ttl,
                serializer=serializer,
                content_type=content_type,
                tags=tags,
                concurrency=concurrency,
                timeout=timeout,
                tenant=tenant,
            )
        )

    @property
    def near_stats(self) -> NearStats:
        """What the near cache did and holds; all zero if there is none."""
        return self._client.near_stats

    def stats(
        self,
        *,
        namespaces: Sequence[str] = (),
        page_size: int = 0,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[cache_pb2.NamespaceStats]:
        """Yields hits, misses, bytes and more for each namespace of the tenant."""
        return self._portal.iterate(
            self._client.stats(
                namespaces=namespaces, page_size=page_size, timeout=timeout, tenant=tenant
            )
        )


class SyncRateLimitClient:
    """Asks whether something may be done now.

    Example:
        >>> decision = mesh.ratelimit.check("search", descriptor={"user": "u1"})
        >>> if not decision.allowed:
        ...     raise TooManyRequests(decision.retry_after_s)
    """

    def __init__(self, client: RateLimitClient, portal: Portal) -> None:
        """``SyncMesh.ratelimit`` is one.

        Args:
            client: makes the calls.
            portal: runs them.
        """
        self._client = client
        self._portal = portal

    def check(
        self,
        name: str,
        *,
        hits: int = 1,
        descriptor: Descriptor | None = None,
        allow_partial: bool = False,
        leased: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Decision:
        """Decides one request and charges it to every limit that applies, or to none.

        A leased check spends tokens that were charged in advance, normally without asking the
        service: it takes microseconds, never admits more than the limit, and may deny while
        others hold the last tokens. What is not spent within a second or so goes back. Limits that
        are strict are asked about all the same.

        Args:
            name: what is to be done; limits are matched by it.
            hits: how much is charged; 0 looks without charging.
            descriptor: facts for matching, such as ``{"user": "u1"}``.
            allow_partial: whether fewer hits than asked for may be granted.
            leased: whether tokens may be leased.
            timeout: seconds; None: what remains in the current scope, or the default.
            tenant: on whose behalf; None: that of the current scope, or the Mesh's.

        Raises:
            MeshError: the service could not be asked. A denial is a result, not an error.
        """
        return self._portal.run(
            self._client.check(
                name,
                hits=hits,
                descriptor=descriptor,
                allow_partial=allow_partial,
                leased=leased,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def spend(
        self,
        name: str,
        *,
        hits: int = 1,
        descriptor: Descriptor | None = None,
        tenant: str | None = None,
    ) -> Decision | None:
        """Decides a request with leased tokens that are at hand, at once.

        Args:
            name: as in ``check``.
            hits: as in ``check``.
            descriptor: as in ``check``.
            tenant: as in ``check``.

        Returns:
            The decision, or None where only ``check`` with ``leased`` can tell.
        """
        return self._portal.call(
            self._client.spend, name, hits=hits, descriptor=descriptor, tenant=tenant
        )

    def check_many(
        self,
        requests: Iterable[CheckRequest],
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> SyncResults[Decision]:
        """Decides many requests, each on its own; see ``Results``."""
        return SyncResults(
            self._portal,
            self._portal.call(self._client.check_many, requests, timeout=timeout, tenant=tenant),
        )

    def reserve(
        self,
        name: str,
        tokens: int,
        *,
        descriptor: Descriptor | None = None,
        ttl: float | None = None,
        request_id: str = "",
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Reservation:
        """Sets an estimated number of tokens aside; ``settle`` must follow.

        Args:
            name: what is to be done.
            tokens: the estimate.
            descriptor: facts for matching.
            ttl: seconds after which an unsettled reservation counts as spent; at most a day.
            request_id: a UUID chosen for this reservation; a second ``reserve`` with it, of the
                same name, returns the first one's. Never that of the scope. Empty: each is new.
            timeout: as in ``check``.
            tenant: as in ``check``.
        """
        return self._portal.run(
            self._client.reserve(
                name,
                tokens,
                descriptor=descriptor,
                ttl=ttl,
                request_id=request_id,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def settle(
        self,
        reservation_id: str,
        tokens: int,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Settlement:
        """Replaces a reservation by what was really used; repeating it changes nothing."""
        return self._portal.run(
            self._client.settle(reservation_id, tokens, timeout=timeout, tenant=tenant)
        )

    def acquire(
        self,
        name: str,
        *,
        slots: int = 1,
        descriptor: Descriptor | None = None,
        ttl: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Slot:
        """Takes concurrency slots; ``release`` gives them back."""
        return self._portal.run(
            self._client.acquire(
                name, slots=slots, descriptor=descriptor, ttl=ttl, timeout=timeout, tenant=tenant
            )
        )

    def renew(
        self,
        slot_id: str,
        *,
        ttl: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> bool:
        """Keeps slots for longer; False if they had already come back."""
        return self._portal.run(
            self._client.renew(slot_id, ttl=ttl, timeout=timeout, tenant=tenant)
        )

    def release(
        self, slot_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> bool:
        """Gives slots back; False if they had already come back."""
        return self._portal.run(self._client.release(slot_id, timeout=timeout, tenant=tenant))

    def set_limit(
        self, limit: ratelimit_pb2.Limit, *, timeout: float | None = None, tenant: str | None = None
    ) -> ratelimit_pb2.Limit:
        """Makes or replaces a limit; returns it as it is in force. For admins.

        Raises:
            MeshError: it stands in the limits file, is malformed, or may not be changed.
        """
        return self._portal.run(self._client.set_limit(limit, timeout=timeout, tenant=tenant))

    def delete_limit(
        self,
        limit_id: str,
        *,
        of_tenant: str = "",
        plan: str = "",
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> None:
        """Removes a limit that was set. For admins.

        Args:
            limit_id: of the limit.
            of_tenant: the tenant whose own limit it is; empty: general.
            plan: the plan it is for; empty: all.
            timeout: as in ``check``.
            tenant: as in ``check``.
        """
        self._portal.run(
            self._client.delete_limit(
                limit_id, of_tenant=of_tenant, plan=plan, timeout=timeout, tenant=tenant
            )
        )

    def get_usage(
        self,
        limit_id: str,
        *,
        counted_by: Descriptor | None = None,
        all_tenants: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> ratelimit_pb2.Usage:
        """Reads how much of a limit the tenant has used.

        Args:
            limit_id: of the limit.
            counted_by: the facts that the limit is counted by, except the tenant.
            all_tenants: of a limit that counts several tenants, what all of them use; for
                operators.
            timeout: as in ``check``.
            tenant: as in ``check``.
        """
        return self._portal.run(
            self._client.get_usage(
                limit_id,
                counted_by=counted_by,
                all_tenants=all_tenants,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def list_usage(
        self,
        limit_id: str = "",
        *,
        all_tenants: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[ratelimit_pb2.Usage]:
        """Yields the tenant's counts that are in use, by limit and facts.

        Args:
            limit_id: only of this limit; empty: of all.
            all_tenants: the limits that count several tenants, as all of these use them; for
                operators.
            page_size: how many to fetch at a time; 0: the service's default.
            timeout: seconds for each page.
            tenant: as in ``check``.
        """
        return self._portal.iterate(
            self._client.list_usage(
                limit_id,
                all_tenants=all_tenants,
                page_size=page_size,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def get_limit(
        self, limit_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> ratelimit_pb2.Limit:
        """Reads the limit in force for the tenant."""
        return self._portal.run(self._client.get_limit(limit_id, timeout=timeout, tenant=tenant))

    def list_limits(
        self,
        *,
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[ratelimit_pb2.Limit]:
        """Yields the limits that the tenant can see, in the order of their ids.

        Args:
            page_size: how many to fetch at a time; 0: the service's default.
            fields: only these fields of each; empty: all.
            timeout: seconds for each page.
            tenant: as in ``check``.
        """
        return self._portal.iterate(
            self._client.list_limits(
                page_size=page_size, fields=fields, timeout=timeout, tenant=tenant
            )
        )


class SyncInferenceClient:
    """Generates text and embeddings.

    Example:
        >>> answer = mesh.inference.generate("Name three rivers.", max_tokens=50)
        >>> answer.text
    """

    def __init__(self, client: InferenceClient, portal: Portal) -> None:
        """``SyncMesh.inference`` is one.

        Args:
            client: makes the calls.
            portal: runs them.
        """
        self._client = client
        self._portal = portal

    def generate(
        self,
        request: GenerateRequest | str,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Answer:
        """Generates one answer and returns it whole.

        Args:
            request: what to answer; a text stands for one message of the user.
            model: name of a model; only with a text.
            max_tokens: most tokens to generate; only with a text.
            timeout: seconds; None: what remains in the current scope, or 120.
            tenant: on whose behalf; None: that of the current scope, or the Mesh's.

        Raises:
            MeshError: a limit denied it, the model failed, or the service could not be reached.
        """
        return self._portal.run(
            self._client.generate(
                request, model=model, max_tokens=max_tokens, timeout=timeout, tenant=tenant
            )
        )

    def stream(
        self,
        request: GenerateRequest | str,
        *,
        model: str | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> SyncAnswerStream:
        """Generates one answer in pieces; see ``AnswerStream``; arguments as in ``generate``."""
        return SyncAnswerStream(
            self._portal,
            self._portal.call(
                self._client.stream,
                request,
                model=model,
                max_tokens=max_tokens,
                timeout=timeout,
                tenant=tenant,
            ),
        )

    def generate_many(
        self,
        requests: Iterable[GenerateRequest | str],
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> SyncResults[Answer]:
        """Generates many answers; see ``Results``."""
        return SyncResults(
            self._portal,
            self._portal.call(self._client.generate_many, requests, timeout=timeout, tenant=tenant),
        )

    def embed(
        self,
        inputs: Sequence[str],
        *,
        model: str,
        dimensions: int = 0,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Embeddings:
        """Turns texts into vectors.

        Args:
            inputs: 1 to 1,000 texts.
            model: name of an embedding model.
            dimensions: length of the vectors, where the model can choose; 0: its own.
            timeout: as in ``generate``.
            tenant: as in ``generate``.
        """
        return self._portal.run(
            self._client.embed(
                inputs, model=model, dimensions=dimensions, timeout=timeout, tenant=tenant
            )
        )

    def count_tokens(
        self,
        request: GenerateRequest | str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> TokenCount:
        """Counts the tokens of a request without running it."""
        return self._portal.run(
            self._client.count_tokens(request, model=model, timeout=timeout, tenant=tenant)
        )

    def list_models(
        self,
        *,
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[inference_pb2.Model]:
        """Yields the models that the tenant may use, in the order of their names."""
        return self._portal.iterate(
            self._client.list_models(
                page_size=page_size, fields=fields, timeout=timeout, tenant=tenant
            )
        )

    def get_model(
        self, name: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> inference_pb2.Model:
        """Reads one model."""
        return self._portal.run(self._client.get_model(name, timeout=timeout, tenant=tenant))


class SyncMetricsClient:
    """Reports measurements in the background and asks questions about them.

    Example:
        >>> mesh.metrics.count("plans_made", labels={"kind": "trip"})
        >>> mesh.metrics.observe("plan_seconds", 0.42, unit="s")
        >>> mesh.metrics.flush()
    """

    def __init__(self, client: MetricsClient, portal: Portal) -> None:
        """``SyncMesh.metrics`` is one.

        Args:
            client: makes the calls.
            portal: runs them.
        """
        self._client = client
        self._portal = portal

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: Labels | None = None,
        tenant: str = "",
        *,
        unit: str = "1",
    ) -> None:
        """Adds to a counter; returns at once."""
        self._portal.call(self._client.count, name, value, labels, tenant, unit=unit)

    def gauge(
        self,
        name: str,
        value: float,
        labels: Labels | None = None,
        tenant: str = "",
        *,
        unit: str = "",
    ) -> None:
        """Sets a gauge; returns at once."""
        self._portal.call(self._client.gauge, name, value, labels, tenant, unit=unit)

    def observe(
        self,
        name: str,
        value: float,
        labels: Labels | None = None,
        tenant: str = "",
        *,
        unit: str = "",
        count: int = 1,
    ) -> None:
        """Adds ``count`` observations of ``value`` to a distribution; returns at once."""
        self._portal.call(self._client.observe, name, value, labels, tenant, unit=unit, count=count)

    @property
    def dropped(self) -> int:
        """Values that were given up because the service was away for too long."""
        return self._client.dropped

    @property
    def rejected(self) -> int:
        """Values that the service refused; ``rejections`` says why."""
        return self._client.rejected

    @property
    def rejections(self) -> tuple[str, ...]:
        """Why values were refused: the last few reasons that the service named."""
        return self._client.rejections

    def flush(self) -> None:
        """Waits until everything measured so far is durable."""
        self._portal.run(self._client.flush())

    def query(
        self,
        query: metrics_pb2.QueryRequest,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[MetricGroup]:
        """Yields the groups of a query, page by page.

        Args:
            query: from ``metric_query``.
            timeout: seconds for each page.
            tenant: whose series; None: the current scope's, or the Mesh's; ``*``: those of all,
                for admins.

        Raises:
            MeshError: the query is not valid, would cost too much, or could not be asked.
        """
        return self._portal.iterate(self._client.query(query, timeout=timeout, tenant=tenant))

    def watch(
        self,
        query: metrics_pb2.QueryRequest,
        *,
        interval: timedelta | None = None,
        tenant: str | None = None,
    ) -> Iterator[list[MetricGroup]]:
        """Yields the groups of a query now, and again as steps end, until the caller leaves.

        The first list has the whole range; later ones the steps that are new or may have changed.
        A stream that breaks is opened again, and begins anew.

        Args:
            query: from ``metric_query``, without an end.
            interval: how often; None: whenever a step ends, or without step every 10 s.
            tenant: as in ``query``.

        Raises:
            MeshError: the service refuses the query.
        """
        return self._portal.iterate(self._client.watch(query, interval=interval, tenant=tenant))

    def list_series(
        self,
        name: str = "",
        *,
        where: Sequence[LabelMatch] = (),
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[metrics_pb2.Series]:
        """Yields the tenant's series, in the order of names and labels.

        Args:
            name: only of this metric; empty: of all.
            where: conditions on labels; all must hold.
            page_size: how many to fetch at a time; 0: the service's default.
            fields: only these fields of each; empty: all.
            timeout: seconds for each page.
            tenant: as in ``query``.
        """
        return self._portal.iterate(
            self._client.list_series(
                name,
                where=where,
                page_size=page_size,
                fields=fields,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def set_alert_rule(
        self,
        rule: metrics_pb2.AlertRule,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> metrics_pb2.AlertRule:
        """Makes or replaces an alert rule, from ``alert_rule``; returns the one in force.

        Raises:
            MeshError: the rule is not valid, comes with the service, or there are too many.
        """
        return self._portal.run(self._client.set_alert_rule(rule, timeout=timeout, tenant=tenant))

    def delete_alert_rule(
        self, rule_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> None:
        """Removes an alert rule; its alerts are resolved.

        Raises:
            MeshError: NOT_FOUND, if there is no such rule.
        """
        self._portal.run(self._client.delete_alert_rule(rule_id, timeout=timeout, tenant=tenant))

    def list_alert_rules(
        self, *, page_size: int = 0, timeout: float | None = None, tenant: str | None = None
    ) -> Iterator[metrics_pb2.AlertRule]:
        """Yields the tenant's alert rules, in the order of their ids."""
        return self._portal.iterate(
            self._client.list_alert_rules(page_size=page_size, timeout=timeout, tenant=tenant)
        )

    def list_alerts(
        self, *, page_size: int = 0, timeout: float | None = None, tenant: str | None = None
    ) -> Iterator[metrics_pb2.Alert]:
        """Yields alerts that are pending or firing, in the order of rules and labels.

        Args:
            page_size: how many to fetch at a time; 0: the service's default.
            timeout: seconds for each page.
            tenant: as in ``query``.
        """
        return self._portal.iterate(
            self._client.list_alerts(page_size=page_size, timeout=timeout, tenant=tenant)
        )

    def create_silence(
        self,
        where: Sequence[LabelMatch],
        end: datetime,
        *,
        start: datetime | None = None,
        comment: str = "",
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> metrics_pb2.Silence:
        """Keeps alerts whose labels meet all conditions from being notified for a while.

        Args:
            where: conditions; at least one.
            end: when it ends.
            start: when it begins; None: now.
            comment: why.
            timeout: seconds.
            tenant: whose alerts; None: the current scope's, or the Mesh's.
        """
        return self._portal.run(
            self._client.create_silence(
                where, end, start=start, comment=comment, timeout=timeout, tenant=tenant
            )
        )

    def expire_silence(
        self, silence_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> None:
        """Ends a silence now.

        Raises:
            MeshError: NOT_FOUND, if there is no such silence.
        """
        self._portal.run(self._client.expire_silence(silence_id, timeout=timeout, tenant=tenant))

    def list_silences(
        self,
        *,
        include_expired: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[metrics_pb2.Silence]:
        """Yields the tenant's silences, in the order of their ids."""
        return self._portal.iterate(
            self._client.list_silences(
                include_expired=include_expired, page_size=page_size, timeout=timeout, tenant=tenant
            )
        )


class SyncAuditClient:
    """Records events and lists them.

    Example:
        >>> mesh.audit.record(AuditEvent("plans.approve", "plans/42", actor="ana"))
    """

    def __init__(self, client: AuditClient, portal: Portal) -> None:
        """``SyncMesh.audit`` is one.

        Args:
            client: makes the calls.
            portal: runs them.
        """
        self._client = client
        self._portal = portal

    def record(
        self, event: AuditEvent, *, timeout: float | None = None, tenant: str | None = None
    ) -> str:
        """Records an event; returns its id once it is durable.

        Raises:
            MeshError: the event is not valid, or the service could not be asked.
        """
        return self._portal.run(self._client.record(event, timeout=timeout, tenant=tenant))

    def note(self, event: AuditEvent, *, tenant: str | None = None) -> None:
        """Records an event in the background: for what must not wait for its audit record."""
        self._portal.call(self._client.note, event, tenant=tenant)

    def list_events(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        actor: str = "",
        action: str = "",
        resource: str = "",
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[audit_pb2.Event]:
        """Yields the tenant's events, the newest first.

        Args:
            start: start of the range, included.
            end: end of the range, not included.
            actor: only by this one.
            action: only this.
            resource: only to this.
            page_size: how many to fetch at a time; 0: the service's default.
            fields: only these fields of each; empty: all.
            timeout: seconds for each page.
            tenant: whose events; None: the current scope's, or the Mesh's.
        """
        return self._portal.iterate(
            self._client.list_events(
                start=start,
                end=end,
                actor=actor,
                action=action,
                resource=resource,
                page_size=page_size,
                fields=fields,
                timeout=timeout,
                tenant=tenant,
            )
        )

    def verify(
        self,
        *,
        first_day: date | None = None,
        last_day: date | None = None,
        anchors: Sequence[audit_pb2.ChainHead] = (),
        tenant: str | None = None,
    ) -> Iterator[audit_pb2.VerifyEventsResponse]:
        """Checks that no event was removed, changed or inserted; yields what it finds, by chain.

        Args:
            first_day: the first UTC day; None: the first there is.
            last_day: the last UTC day; None: today.
            anchors: heads that earlier checks found: the chains must still lead through them.
            tenant: whose events; None: the current scope's, or the Mesh's. ``*``: all tenants',
                for admins.

        Raises:
            MeshError: the caller may not ask for them, or the service could not be asked.
        """
        return self._portal.iterate(
            self._client.verify(
                first_day=first_day, last_day=last_day, anchors=anchors, tenant=tenant
            )
        )


class SyncLogsClient:
    """Lists log records, and keeps those of other programs beside them.

    Example:
        >>> for record in mesh.logs.list(service="inference", level="warning"):
        ...     print(record.record_time.ToDatetime(), record.message)
    """

    def __init__(self, client: LogsClient, portal: Portal) -> None:
        """``SyncMesh.logs`` is one.

        Args:
            client: makes the calls.
            portal: runs them.
        """
        self._client = client
        self._portal = portal

    def write(
        self,
        records: Sequence[logs_pb2.LogRecord],
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> None:
        """Keeps records; those that have ids may be written again.

        Args:
            records: any number; more than a message holds are sent in several.
            timeout: seconds for each message.
            tenant: whose those are that name none; None: the current scope's, or the Mesh's.

        Raises:
            MeshError: a record is not valid, or the service could not be asked.
        """
        self._portal.run(self._client.write(records, timeout=timeout, tenant=tenant))

    def list(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        level: LevelName | None = None,
        service: str = "",
        pattern: str = "",
        trace_id: str = "",
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Iterator[logs_pb2.LogRecord]:
        """Yields records, the newest first.

        Args:
            start: start of the range, included.
            end: end of the range, not included.
            level: the least one; None: any.
            service: only of this one.
            pattern: only with this one.
            trace_id: only of this trace.
            page_size: how many to fetch at a time; 0: the service's default.
            fields: only these fields of each; empty: all.
            timeout: seconds for each page.
            tenant: whose records; None: the current scope's, or the Mesh's. ``*``: all tenants',
                for admins.

        Raises:
            KeyError: there is no such level.
            MeshError: the caller may not see them, or the service could not be asked.
        """
        return self._portal.iterate(
            self._client.list(
                start=start,
                end=end,
                level=level,
                service=service,
                pattern=pattern,
                trace_id=trace_id,
                page_size=page_size,
                fields=fields,
                timeout=timeout,
                tenant=tenant,
            )
        )


class SyncProfilingClient:
    """Profiles one of the services; for admins.

    Example:
        >>> profile = mesh.profiling.profile("inference", "cpu", seconds=10)
        >>> Path("inference.speedscope.json").write_bytes(profile.content)
    """

    def __init__(self, client: ProfilingClient, portal: Portal) -> None:
        """``SyncMesh.profiling`` is one.

        Args:
            client: makes the calls.
            portal: runs them.
        """
        self._client = client
        self._portal = portal

    def profile(
        self,
        service: str,
        kind: Kind = "cpu",
        *,
        seconds: float = 10.0,
        output: Format = "speedscope",
    ) -> ProfileFile:
        """Profiles a replica of a service for a while.

        Args:
            service: inference, cache, ratelimit or metrics.
            kind: what is looked at.
            seconds: for how long, at most 60.
            output: how the profile is written.

        Raises:
            ValueError: there is no such service, kind or output.
            MeshError: PERMISSION_DENIED, if the caller is no admin; RESOURCE_EXHAUSTED, while
                another profile is made; or the service could not be asked.
        """
        return self._portal.run(self._client.profile(service, kind, seconds=seconds, output=output))


class SyncMesh:
    """A Mesh whose calls block; it may be shared by threads.

    Example:
        >>> with SyncMesh.connect(tenant="acme") as mesh:
        ...     print(mesh.inference.generate("Say hello.").text)

    Attributes:
        cache: the cache service.
        ratelimit: the ratelimit service.
        inference: the inference service.
        metrics: measurements: reported in the background, and queried.
        audit: audit events.
        logs: what the services logged.
        profiling: profiles of running services.
    """

    def __init__(self, mesh: Mesh, portal: Portal) -> None:
        """Use ``SyncMesh.connect``.

        Args:
            mesh: connected on the portal's loop.
            portal: runs the calls.
        """
        self._mesh = mesh
        self._portal = portal
        self.cache = SyncCacheClient(mesh.cache, portal)
        self.ratelimit = SyncRateLimitClient(mesh.ratelimit, portal)
        self.inference = SyncInferenceClient(mesh.inference, portal)
        self.metrics = SyncMetricsClient(mesh.metrics, portal)
        self.audit = SyncAuditClient(mesh.audit, portal)
        self.logs = SyncLogsClient(mesh.logs, portal)
        self.profiling = SyncProfilingClient(mesh.profiling, portal)

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
        """Makes a SyncMesh.

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
        portal = Portal()
        try:
            mesh = portal.call(
                Mesh.connect,
                inference=inference,
                cache=cache,
                ratelimit=ratelimit,
                metrics=metrics,
                tenant=tenant,
                api_key=api_key,
                tls=tls,
                default_timeout=default_timeout,
                patience=patience,
                max_message_bytes=max_message_bytes,
                bounds=bounds,
                near_cache=near_cache,
            )
        except BaseException:
            portal.close()
            raise
        return cls(mesh, portal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self, grace: float = 1.0) -> None:
        """Reports what was measured, waits for what is in flight, and closes all connections.

        Args:
            grace: seconds that both may take together; then the rest fails with UNAVAILABLE.
        """
        if not self._portal.closed:
            self._portal.run(self._mesh.close(grace))
            self._portal.close()
