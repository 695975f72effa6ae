"""Neighbours: pages that lie near each other in one object, read together into their places and hashed.

Knows offsets and digests. Must not know where pages lie, or what becomes of one that came wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvist.hashing import Buffer
from kvist.store import Range, Store
from kvist.store.ranges import GAP

Wanted = tuple[bytes, memoryview]
"""The raw digest of a page, and the buffer that it shall fill."""
Read = tuple[int, Wanted]
"""Where it begins in its object, and what is wanted."""


def read_near(store: Store, digest: Callable[[Buffer], bytes], key: str, reads: Sequence[Read]) -> list[Read]:
    """Fill the buffers; those reads whose bytes are not what they should be.

    Args:
        store: where the object is.
        digest: names a page.
        key: the object's.
        reads: ascending by where they begin; one page may be wanted twice.

    Raises:
        NotFound, IntegrityError, StoreError: as `Store.get_ranges`.
    """
    return (_view if _is_viewed(store, reads) else _fill)(store, digest, key, reads)


def _is_viewed(store: Store, reads: Sequence[Read]) -> bool:
    """Whether one view shows them all, with little between them that nobody asked for."""
    if not store.has_views:
        return False
    first, (last, (_, out)) = reads[0][0], reads[-1]
    span = last + len(out) - first
    return span <= store.window and span - sum(len(out) for _, (_, out) in reads) <= GAP


def _view(store: Store, digest: Callable[[Buffer], bytes], key: str, reads: Sequence[Read]) -> list[Read]:
    """Each page is hashed as soon as it is copied into its place, while it is in a processor's cache."""
    first, (last, (_, out)) = reads[0][0], reads[-1]
    data = store.view(key, first, last + len(out) - first)
    bad = []
    for read in reads:
        start, (raw, out) = read
        out[:] = data[start - first : start - first + len(out)]
        if digest(out) != raw:
            bad.append(read)
    return bad


def _fill(store: Store, digest: Callable[[Buffer], bytes], key: str, reads: Sequence[Read]) -> list[Read]:
    first = {start: out for start, (_, out) in reversed(reads)}
    store.get_ranges(key, [Range(start, first[start]) for start in sorted(first)])
    bad = []
    for start, (raw, out) in reads:
        if out is not first[start]:
            out[:] = first[start]  # the page was asked for twice and read once
        if digest(out) != raw:
            bad.append((start, (raw, out)))
    return bad
