"""Which slots a request's counts are in, and the ids that tell where a record is."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from agent360.mesh.ratelimit.record_ids import Kind
from agent360.mesh.ratelimit.stores.redis.keys import Count

Counts = tuple[Count, ...]


class Part(NamedTuple):
    """The counts of one slot."""

    tag: str
    counts: Counts


def parts_of(counts: Counts, *, clustered: bool) -> list[Part]:
    """The counts by their slots; a single server has one."""
    if not clustered:
        return [Part(counts[0].tag, counts)]
    by_tag: dict[str, list[Count]] = {}
    for count in counts:
        by_tag.setdefault(count.tag, []).append(count)
    return [Part(tag, tuple(part)) for tag, part in by_tag.items()]


def record_id(
    kind: Kind, tenant: str, parts: Sequence[Part], request: tuple[str, str] | None = None
) -> str:
    """A name that says in which slots a record is.

    Args:
        kind: what it remembers.
        tenant: whose it is.
        parts: where it is.
        request: name and id of the request that makes it: the same one makes the same name,
            whichever replica it asks. None: a name that nothing else has.
    """
    tags = [part.tag for part in parts]
    head = "t" if tenant in tags else "g"
    if request is None:
        unique = secrets.token_urlsafe(12)
    else:
        made_by = "\0".join((tenant, *request)).encode()
        unique = hashlib.sha256(made_by).hexdigest()[:32]
    return kind.value + head + unique + "".join(tag for tag in tags if tag != tenant)


def tags_of(tenant: str, name: str) -> list[str]:
    """The tags in a record's name."""
    head, *others = name[2:].split("~")
    own = [tenant] if head.startswith("t") or not others else []
    return [*own, *(f"~{limit_id[:128]}" for limit_id in others[:16])]
