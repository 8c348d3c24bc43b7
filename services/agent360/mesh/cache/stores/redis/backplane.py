"""Hears what other replicas change, in order, and notices when something went unheard."""

from __future__ import annotations

from agent360.mesh.cache.sharing import Listener
from agent360.mesh.cache.stores.redis.messages import Message, keys_of, read_message
from agent360.mesh.cache.stores.redis.shards import Shard, Shards
from agent360.mesh.runtime.redis import Redis, Subscription


class Backplane:
    """Turns published messages into calls of a listener.

    Invariant: while changes are heard, ``Shard.last`` is the last version of which the listener
    was told, or 0 before the first. A message that does not follow on it means that another was
    lost, and everything of the namespace that is held is doubtful.
    """

    def __init__(self, redis: Redis, channel: bytes, shards: Shards, listener: Listener) -> None:
        self.newest = 0
        """The newest version that was heard of."""
        self._shards = shards
        self._listener = listener
        self._subscription = Subscription(
            redis,
            [channel],
            on_message=self._on_message,
            on_up=self._on_up,
            on_down=listener.hears_no_more,
        )

    @property
    def up(self) -> bool:
        """Whether changes are heard."""
        return self._subscription.up

    async def start(self) -> None:
        """Returns once changes are heard."""
        await self._subscription.start()

    async def close(self) -> None:
        """Listens no more."""
        await self._subscription.close()

    def saw_version(self, shard: Shard, version: str | None) -> None:
        """A namespace's version was named; if it is a later one, all that was before is over.

        Versions only grow: an earlier one is old news. None: the store knows none (any more).
        """
        before = shard.version
        if version is None or before is None or int(version) > int(before):
            shard.version = version
            if before is not None:
                self._listener.missed(shard.tenant, shard.namespace)

    def forget(self) -> None:
        """The store may be another, or an older copy of itself: its versions are learnt anew."""
        for shard in self._shards.all():
            shard.last = 0
            shard.version = None

    def _on_up(self) -> None:
        self.forget()
        self._listener.hears()

    def _on_message(self, _: bytes, payload: bytes) -> None:
        message = read_message(payload)
        shard = None if message is None else self._shards.at(message.base)
        if message is None or shard is None:
            return
        if message.previous < message.latest <= shard.last:
            return  # it was heard from another server of the cluster before
        if shard.last and shard.last < message.previous:
            self._listener.missed(shard.tenant, shard.namespace)
        shard.last = max(shard.last, message.latest)
        shard.newest = max(shard.newest, message.latest)
        self.newest = max(self.newest, message.latest)
        self._tell(shard, message)

    def _tell(self, shard: Shard, message: Message) -> None:
        listener, tenant, namespace = self._listener, shard.tenant, shard.namespace

        def within(key: str) -> bool:
            return self._shards.of_key(tenant, namespace, key) is shard

        names, version = message.names, message.version
        match message.kind:
            case "k":
                self.saw_version(shard, message.space)
                listener.written(tenant, namespace, keys_of(message))
            case "p":
                listener.invalidated(tenant, namespace, "prefix", names, version, within)
            case "t":
                listener.invalidated(tenant, namespace, "tags", names, version, within)
            case "a":
                if shard.version is None or int(message.space) > int(shard.version):
                    shard.version = message.space
                listener.invalidated(tenant, namespace, "all", (), version, within)
            case "c":
                listener.released(tenant, namespace, *names)
