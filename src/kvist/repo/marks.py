"""Marks: empty objects that tell all processes what their keys say: which page copies are damaged, what was pruned.

Knows their keys. Must not know how damage is found, what is pruned, nor what becomes of either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from kvist.errors import KvistError
from kvist.ids import digest_hex, parse_cid
from kvist.repo.segment import PREFIX as SEGMENTS
from kvist.store import ObjectInfo, Store

DAMAGED: Final = "damaged/"
PRUNED: Final = "pruned/"
_DAMAGED_KEY: Final = re.compile(rf"{DAMAGED}(.+)/([0-9a-f]{{64}})")

Mark = tuple[str, bytes]
"""Segment key and raw digest of a damaged page copy."""


# -- damaged page copies -----------------------------------------------------------------------------------------


def read(store: Store) -> set[Mark]:
    """All marks of damaged copies; objects that are none are left out."""
    return {mark for mark in map(parse, store.list(DAMAGED)) if mark is not None}


def parse(info: ObjectInfo) -> Mark | None:
    """The mark of damage that an object is; ``None``: it is none."""
    found = _DAMAGED_KEY.fullmatch(info.key)
    return None if found is None else (SEGMENTS + found[1], bytes.fromhex(found[2]))


def record(store: Store, mark: Mark) -> None:
    """Mark a copy; to mark it twice is no error."""
    store.put(_key(mark), b"")


def withdraw(store: Store, marks: Iterable[Mark]) -> None:
    """Take marks back: the copies are whole after all."""
    store.delete(map(_key, marks))


def drop_stale(store: Store) -> None:
    """Delete the marks of segments that are gone."""
    marks = [(info.key, parse(info)) for info in store.list(DAMAGED)]
    if marks:
        left = {info.key for info in store.list(SEGMENTS)}
        store.delete([key for key, mark in marks if mark is not None and mark[0] not in left])


def _key(mark: Mark) -> str:
    segment, raw = mark
    return f"{DAMAGED}{segment.removeprefix(SEGMENTS)}/{raw.hex()}"


# -- pruned snapshots --------------------------------------------------------------------------------------------


def pruned_key(cid: str) -> str:
    """Where the mark of a pruned snapshot lies."""
    return PRUNED + digest_hex(cid)


def pruned(store: Store) -> dict[str, ObjectInfo]:
    """Mark by cid of every pruned snapshot: its record is kept, its manifests and pages need not be there."""
    found = {}
    for info in store.list(PRUNED):
        try:
            found[parse_cid("sha256:" + info.key.removeprefix(PRUNED))] = info
        except KvistError:
            continue  # not one of ours; fsck names it
    return found


def record_pruned(store: Store, cids: Iterable[str]) -> None:
    """Mark snapshots as pruned, durably; to mark one again makes its mark young again."""
    store.put_many([(pruned_key(cid), b"") for cid in cids], mode="overwrite")
