"""Stores of entries, chosen by URL."""

from __future__ import annotations

from urllib.parse import urlsplit

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.ports import Store
from agent360.mesh.cache.stores.memory import MemoryStore

SUPPORTED = ("memory://",)


def check_store_url(url: str) -> str:
    """The URL, if it names a supported store.

    Raises:
        ValueError: it does not.
    """
    if f"{urlsplit(url).scheme}://" not in SUPPORTED:
        raise ValueError(f"the store {url!r} is not supported; supported: {', '.join(SUPPORTED)}")
    if url != SUPPORTED[0]:
        raise ValueError(f"the store {url!r} takes nothing after memory://")
    return url


def open_store(url: str, bounds: Bounds, *, max_namespaces: int, now: float) -> Store:
    """The store that a URL names.

    Args:
        url: such as ``memory://``.
        bounds: what its entries may take in all.
        max_namespaces: of one tenant.
        now: monotonic time in seconds.

    Raises:
        ValueError: the URL names no supported store.
    """
    check_store_url(url)
    return MemoryStore(bounds, max_namespaces=max_namespaces, now=now)
