"""Moving: objects and pages from one repository into another, verified on both sides, in bounded memory.

Knows batches and how to read ahead. Must not know refs, nor why something is moved.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from kvist.errors import IntegrityError, NotFound
from kvist.repo import lock, marks
from kvist.repo.batch import windows
from kvist.repo.objects import manifest_key
from kvist.repo.repository import Repository
from kvist.store.parallel import in_parallel

BATCH_BYTES: Final = 128 << 20
"""Bytes of pages that become durable together, as one segment: what an interruption costs at most."""
_OBJECTS: Final = 64
"""Objects that are put together, at most."""
_OBJECT_BYTES: Final = 64 << 20
"""Bytes of manifests that are put together; a larger one goes alone."""
_SIGNATURE_MAX: Final = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Moved:
    """What was new at the target.

    Attributes:
        new_pages: how many pages.
        new_bytes: bytes of those.
    """

    new_pages: int = 0
    new_bytes: int = 0


def move_manifests(source: Repository, target: Repository, cids: Sequence[str], renew: Callable[[], None]) -> None:
    """Copy manifests, as the bytes that they are."""
    infos = in_parallel(source.store.head, map(manifest_key, cids), source.store)
    sizes = [max(_OBJECT_BYTES // _OBJECTS, 0 if info is None else info.size) for info in infos]
    for chunk in windows(cids, sizes, _OBJECT_BYTES):
        target.objects.put_encoded_manifests([*in_parallel(source.objects.encoded_manifest, chunk, source.store)])
        renew()


def move_snapshots(
    source: Repository, target: Repository, cids: Sequence[str], pruned: Sequence[str], renew: Callable[[], None]
) -> None:
    """Copy snapshots in this order; those in ``pruned`` are marked at the target before they appear there."""
    if pruned:
        marks.record_pruned(target.store, pruned)
    for first in range(0, len(cids), _OBJECTS):
        target.objects.put_snapshots([source.objects.snapshot(cid) for cid in cids[first : first + _OBJECTS]])
        renew()


def move_signatures(source: Repository, target: Repository, keys: Sequence[str], renew: Callable[[], None]) -> None:
    """Copy signatures, over whatever lies there. Whom they come from is checked where a snapshot is checked out."""

    def read(key: str) -> tuple[str, bytes]:
        try:
            data = source.store.get(key, size=_SIGNATURE_MAX + 1)
        except NotFound:
            data = b""  # gone since it was listed
        if len(data) > _SIGNATURE_MAX:
            logger.warning("%s has more than %s bytes: it is no signature, and is left", key, _SIGNATURE_MAX)
        return key, data

    for first in range(0, len(keys), _OBJECTS):
        found = in_parallel(read, keys[first : first + _OBJECTS], source.store)
        target.store.put_many([each for each in found if 0 < len(each[1]) <= _SIGNATURE_MAX], mode="overwrite")
        renew()


def move_pages(
    source: Repository,
    target: Repository,
    digests: Sequence[str],
    batch_bytes: int,
    renew: Callable[[], None],
    progress: Callable[[int, int], None] | None,
) -> Moved:
    """Copy those pages that the target lacks, or that a gc there is about to take.

    The source's pages are verified as they are read; the target names each by its own digest, which must be the same.
    One batch is read while the one before is written. A batch is durable once it is put.

    Args:
        source, target: repositories that name pages alike.
        digests: of all pages that the target must have in the end.
        batch_bytes: most bytes of pages that are put together; a larger page goes alone.
        renew: called after each batch.
        progress: called with bytes put, and bytes to put; first with none put.

    Raises:
        DamagedPage, MissingPage: the source cannot give one.
        IntegrityError: one arrived as something else.
    """
    lacking = _lacking(target, digests)
    sizes = [_size(source, digest) for digest in lacking]
    pages = list(zip(lacking, sizes, strict=True))
    batches = list(windows(pages, sizes, batch_bytes))
    if not batches:
        return Moved()
    room = max(sum(size for _, size in batch) for batch in batches)
    scratch = [memoryview(bytearray(room)) for _ in batches[:2]]
    done, total, new_pages, new_bytes = 0, sum(sizes), 0, 0
    if progress is not None:
        progress(done, total)
    with ThreadPoolExecutor(1, thread_name_prefix="kvist-read-ahead") as ahead:
        reading = ahead.submit(_read, source, batches[0], scratch[0])
        for number, batch in enumerate(batches):
            pages_read = reading.result()
            if number + 1 < len(batches):
                reading = ahead.submit(_read, source, batches[number + 1], scratch[(number + 1) % 2])
            put = target.put_pages(pages_read)
            _require_same([digest for digest, _ in batch], put.digests, target)
            done += sum(size for _, size in batch)
            new_pages, new_bytes = new_pages + put.new_pages, new_bytes + put.new_bytes
            renew()
            if progress is not None:
                progress(done, total)
    return Moved(new_pages, new_bytes)


def _lacking(target: Repository, digests: Iterable[str]) -> list[str]:
    condemned = lock.condemned(target.store)
    pages = target.pages
    pages.refresh()
    if condemned == lock.Condemned():
        return [digest for digest in digests if pages.size(digest) is None]
    return [digest for digest in digests if condemned.loses(digest, pages.homes(digest))]


def _size(source: Repository, digest: str) -> int:
    size = source.pages.size(digest)
    if size is None:
        raise source.pages.absent(digest)
    return size


def _read(source: Repository, batch: Sequence[tuple[str, int]], room: memoryview) -> list[memoryview]:
    """The batch's pages, verified, back to back in ``room``."""
    ends = [*itertools.accumulate(size for _, size in batch)]
    outs = [room[end - size : end] for end, (_, size) in zip(ends, batch, strict=True)]
    source.get_pages([digest for digest, _ in batch], outs)
    return outs


def _require_same(sent: Sequence[str], stored: Sequence[str], target: Repository) -> None:
    for wanted, found in zip(sent, stored, strict=True):
        if wanted != found:
            raise IntegrityError(
                f"page {wanted} arrived at {target.store.url} as {found}: it changed in this machine's memory",
                hint="run it again; if it happens again, test the memory",
            )
