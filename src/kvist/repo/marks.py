"""Damage marks: which page copies were found damaged, remembered for all processes as empty objects.

Knows their keys. Must not know how damage is found, nor what becomes of a page.
"""

from __future__ import annotations

from typing import Final

from kvist.repo.segment import PREFIX as SEGMENTS
from kvist.store import ObjectInfo, Store

PREFIX: Final = "damaged/"

Mark = tuple[str, bytes]
"""Segment key and raw digest of a damaged page copy."""


def read(store: Store) -> set[Mark]:
    """All marks; objects that are none are left out."""
    return {mark for mark in map(_parse, store.list(PREFIX)) if mark is not None}


def record(store: Store, mark: Mark) -> None:
    """Mark a copy; to mark it twice is no error."""
    segment, raw = mark
    store.put(f"{PREFIX}{segment.removeprefix(SEGMENTS)}/{raw.hex()}", b"")


def drop_stale(store: Store) -> None:
    """Delete the marks of segments that are gone."""
    marks = [(info.key, _parse(info)) for info in store.list(PREFIX)]
    if marks:
        left = {info.key for info in store.list(SEGMENTS)}
        store.delete([key for key, mark in marks if mark is not None and mark[0] not in left])


def _parse(info: ObjectInfo) -> Mark | None:
    name, _, page = info.key.removeprefix(PREFIX).rpartition("/")
    try:
        return SEGMENTS + name, bytes.fromhex(page)
    except ValueError:
        return None
