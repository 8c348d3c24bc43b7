"""Which stores there are, by URL."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

MEMORY: Final = "memory://"
_REDIS: Final = ("redis", "rediss", "redis+cluster", "rediss+cluster")


def check_store_url(url: str) -> str:
    """The URL, if it names a supported store.

    Raises:
        ValueError: it does not.
    """
    scheme = urlsplit(url).scheme
    if scheme in _REDIS:
        try:
            from agent360.mesh.runtime.redis import check_redis_url  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise ValueError(
                f"a store {scheme}:// needs the extra agent360-mesh[redis]: {error}"
            ) from error
        return check_redis_url(url)
    if f"{scheme}://" != MEMORY:
        known = ", ".join((MEMORY, *(f"{each}://" for each in _REDIS)))
        raise ValueError(f"a store {scheme}:// is not supported; supported: {known}")
    if url != MEMORY:
        raise ValueError(f"the store {url!r} takes nothing after memory://")
    return url


def is_cluster(url: str) -> bool:
    """Whether a URL names a cluster."""
    return urlsplit(url).scheme.endswith("+cluster")
