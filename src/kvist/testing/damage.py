"""Damage: what disks, wires and hands do to the bytes of a repository, on purpose and by a seed.

Knows where the bytes of each kind lie. Must not know what a reader makes of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kvist.repo import segment
from kvist.repo.config import CONFIG, RepositoryConfig
from kvist.store import Store

KINDS: Final = {
    CONFIG: "config",
    "manifests/": "manifest",
    "snapshots/": "snapshot",
    "refs/branches/": "branch",
    "refs/tags/": "tag",
    "locks/": "lock",
    "leases/": "lease",
    "damaged/": "damage mark",
    "pruned/": "prune mark",
    "signatures/": "signature",
}
"""Kind of each object by the start of its key. A segment has three: ``page``, ``index`` and ``footer``."""
_FOOTER: Final = 64
_JUNK: Final = 100


class Way(StrEnum):
    """How bytes come to harm."""

    FLIP = "flip"
    CUT = "cut"
    EMPTY = "empty"
    SWAP = "swap"
    DELETE = "delete"
    EXTEND = "extend"


@dataclass(frozen=True, slots=True)
class Part:
    """A run of bytes of one kind.

    Attributes:
        kind: see `KINDS`.
        key: of the object.
        start, stop: where in it.
    """

    kind: str
    key: str
    start: int
    stop: int


def parts(store: Store) -> Iterator[Part]:
    """Every byte of an undamaged repository, by kind; objects that are none of its own are left out."""
    config = RepositoryConfig.decode(store.get(CONFIG), store.url)
    for info in store.list():
        if info.key.startswith(segment.PREFIX):
            found = segment.read_index(store, info.key, info.size, info.modified, config.page_digest)
            yield from (Part("page", info.key, *found.offsets[i : i + 2]) for i in range(len(found.digests)))
            yield Part("index", info.key, found.data_bytes, info.size - _FOOTER)
            yield Part("footer", info.key, info.size - _FOOTER, info.size)
        else:
            kinds = (kind for start, kind in KINDS.items() if info.key.startswith(start))
            yield from (Part(kind, info.key, 0, info.size) for kind in kinds)


def harm(store: Store, part: Part, way: Way, others: Sequence[Part], chance: random.Random) -> frozenset[str]:
    """Damage the bytes of one part; the rest of its object is left as it is, unless the object is deleted.

    Args:
        store: where it lies.
        part: what is hit.
        way: one bit flipped; the part's end cut off, or all of it; it and another's bytes in each other's place;
            the object deleted; junk after the part.
        others: parts of the same kind, for `Way.SWAP`; where all are equal, a bit is flipped.
        chance: decides the rest.

    Returns:
        The keys of the objects that are different now.
    """
    data = store.get(part.key)
    body = data[part.start : part.stop]
    match way:
        case Way.DELETE:
            store.delete([part.key])
            return frozenset([part.key])
        case Way.CUT:
            body = body[: chance.randrange(len(body))] if body else b""
        case Way.EMPTY:
            body = b""
        case Way.EXTEND:
            body += chance.randbytes(chance.randint(1, _JUNK))
        case Way.SWAP if swapped := _swap(store, part, data, others, chance):
            return swapped
        case _ if body:
            at = chance.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1 << chance.randrange(8)]) + body[at + 1 :]
    return _write(store, part.key, data, data[: part.start] + body + data[part.stop :])


def _swap(store: Store, part: Part, data: bytes, others: Sequence[Part], chance: random.Random) -> frozenset[str]:
    body = data[part.start : part.stop]
    bodies = {other: store.get(other.key, start=other.start, size=other.stop - other.start) for other in others}
    unequal = [other for other, found in bodies.items() if found != body]
    if not unequal:
        return frozenset()
    other = chance.choice(unequal)
    if other.key != part.key:
        there = store.get(other.key)
        store.put(other.key, there[: other.start] + body + there[other.stop :])
        store.put(part.key, data[: part.start] + bodies[other] + data[part.stop :])
        return frozenset([part.key, other.key])
    first, last = sorted((part, other), key=lambda each: each.start)
    between = data[first.stop : last.start]
    ends = data[last.start : last.stop] + between + data[first.start : first.stop]
    return _write(store, part.key, data, data[: first.start] + ends + data[last.stop :])


def _write(store: Store, key: str, old: bytes, new: bytes) -> frozenset[str]:
    if new == old:
        return frozenset()
    store.put(key, new)
    return frozenset([key])
