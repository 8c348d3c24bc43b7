"""Functions whose results are cached: ``cached``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import typing
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

from agent360.client.cached_keys import Arguments, KeyMaker, key_maker, templates
from agent360.client.entry_client import DEFAULT_NAMESPACE
from agent360.client.loading import LoadingClient
from agent360.client.serializers import Serializer, serializer_for

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Options:
    """How the results of one function are cached; see ``cached``."""

    namespace: str
    ttl: float | None
    stale_ttl: float | None
    allow_stale: bool
    eager_refresh: float | None
    fill_timeout: float | None
    timeout: float | None


class CachedFunction(Generic[P, T]):
    """An asynchronous function whose results are cached. It has the function's own signature.

    Example:
        >>> @mesh.cache.cached(ttl=60, key="plan:{plan_id}")
        ... async def plan(plan_id: int) -> Plan: ...
        >>> await plan(42)
        >>> await plan.invalidate(42)
    """

    __name__: str
    __qualname__: str

    def __init__(
        self,
        function: Callable[P, Awaitable[T]],
        cache: Callable[[], LoadingClient],
        options: _Options,
        make_key: KeyMaker,
        make_tags: Callable[[Arguments], Sequence[str]],
        serializer: Callable[[], Serializer[T]],
        bound: tuple[Any, ...] = (),
    ) -> None:
        """Use ``cached``."""
        functools.update_wrapper(self, function)
        self._function = function
        self._cache = cache
        self._options = options
        self._make_key = make_key
        self._make_tags = make_tags
        self._serializer = serializer
        self._bound = bound
        _mark_as_coroutine_function(self)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result, from the cache where it is there."""
        options = self._options
        arguments = self._make_key.bind((*self._bound, *args), kwargs)
        return await self._cache().get_or_load(
            self._make_key.key(arguments),
            functools.partial(self._function, *self._bound, *args, **kwargs),
            namespace=options.namespace,
            ttl=options.ttl,
            stale_ttl=options.stale_ttl,
            allow_stale=options.allow_stale,
            eager_refresh=options.eager_refresh,
            serializer=self._serializer(),
            tags=self._make_tags(arguments),
            fill_timeout=options.fill_timeout,
            timeout=options.timeout,
        )

    def key(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The key of the entry for these arguments."""
        return self._make_key.key(self._make_key.bind((*self._bound, *args), kwargs))

    async def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Removes the entry for these arguments; returns whether there was one."""
        key = self.key(*args, **kwargs)
        return await self._cache().delete(key, namespace=self._options.namespace)

    async def refresh(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls the function, puts its result in the place of what is there, and returns it."""
        arguments = self._make_key.bind((*self._bound, *args), kwargs)
        value = await self._function(*self._bound, *args, **kwargs)
        serializer = self._serializer()
        await self._cache().set(
            self._make_key.key(arguments),
            serializer.encode(value),
            namespace=self._options.namespace,
            ttl=self._options.ttl,
            stale_ttl=self._options.stale_ttl,
            content_type=serializer.content_type,
            tags=self._make_tags(arguments),
        )
        return value

    @overload
    def __get__(self, instance: None, owner: type) -> CachedFunction[P, T]: ...

    @overload
    def __get__(
        self: CachedFunction[Concatenate[S, Q], T], instance: S, owner: type | None = None
    ) -> CachedFunction[Q, T]: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: bound to its object."""
        if instance is None:
            return self
        return CachedFunction(
            self._function,
            self._cache,
            self._options,
            self._make_key,
            self._make_tags,
            self._serializer,
            (instance,),
        )


def cached(
    cache: LoadingClient | Callable[[], LoadingClient],
    *,
    ttl: float | None = None,
    stale_ttl: float | None = None,
    key: str | Callable[..., str] | None = None,
    namespace: str = DEFAULT_NAMESPACE,
    tags: Sequence[str] = (),
    serializer: Serializer[Any] | None = None,
    ignore: Sequence[str] = (),
    allow_stale: bool = True,
    eager_refresh: float | None = None,
    fill_timeout: float | None = None,
    timeout: float | None = None,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], CachedFunction[P, T]]:
    """Caches the results of an asynchronous function, None among them; errors are not cached.

    Example:
        >>> @cached(lambda: app.mesh.cache, ttl=60, key="plan:{plan_id}")
        ... async def plan(plan_id: int) -> Plan: ...

    Args:
        cache: the cache, or what gives it when it is needed, for use where none is connected yet.
        ttl: seconds that a result is fresh; None: the service's default.
        stale_ttl: seconds after its TTL that it may be served stale.
        key: of a result's entry: a template such as ``plan:{plan_id}``, or a function of the
            arguments. None: the function's qualified name and the arguments; it is the same in all
            processes.
        namespace: groups keys.
        tags: labels for ``CacheClient.invalidate``; templates as for ``key``.
        serializer: of the results; None: by the function's return annotation.
        ignore: arguments that are left out of a key that is made of all arguments, such as
            ``self``.
        allow_stale: as in ``CacheClient.get_or_load``.
        eager_refresh: as in ``CacheClient.get_or_load``.
        fill_timeout: as in ``CacheClient.get_or_load``.
        timeout: as in ``CacheClient.get_or_load``.

    Raises:
        TypeError: the function is not asynchronous, has no return annotation where one is needed,
            or has no such argument as the key names.
    """
    options = _Options(namespace, ttl, stale_ttl, allow_stale, eager_refresh, fill_timeout, timeout)
    give = cache if not isinstance(cache, LoadingClient) else _always(cache)

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> CachedFunction[P, T]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{_name(function)} is not an asynchronous function")
        return CachedFunction(
            function,
            give,
            options,
            key_maker(function, key, ignore),
            templates(function, tags),
            _always(serializer) if serializer is not None else _serializer_of(function),
        )

    return decorate


def _serializer_of(function: Callable[..., Any]) -> Callable[[], Serializer[Any]]:
    """Gives the serializer of a function's results; its annotation may name what comes later."""
    if "return" not in getattr(function, "__annotations__", {}):
        raise TypeError(f"{_name(function)} has no return annotation: add one, or a serializer")

    @functools.cache
    def found() -> Serializer[Any]:
        annotation = typing.get_type_hints(function, include_extras=True)["return"]
        return serializer_for(annotation)

    # If what the annotation names is not there yet, the first call finds it.
    with contextlib.suppress(NameError):
        found()
    return found


def _always(value: T) -> Callable[[], T]:
    return lambda: value


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))


def _mark_as_coroutine_function(function: Any) -> None:
    """Lets frameworks that ask see that a call gives a coroutine."""
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(function)
