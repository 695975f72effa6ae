"""Captures of one rank: pages out of the cache into host memory, then hashed and stored, then named by manifests.

The engine's thread begins captures and copies; one thread of our own does the rest. Knows pages, manifests and a
repository; must not know how requests are scheduled, nor how pages come back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from kvist.engines.paged.pages import Done, GroupPages
from kvist.engines.paged.plans import CapturePlan, Place, SequencePlan
from kvist.engines.paged.staging import HostPool, unbind
from kvist.layout import Layout
from kvist.repo.manifest import LogicalSeq, Manifest, PageEntry
from kvist.repo.repository import Repository

_CHUNK: Final = 32 << 20
"""Bytes that one call copies out."""

Digests = tuple[str, str]
"""Of a page's K and V half."""


class Known:
    """Which stored page a block of the cache holds, while it holds it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[tuple[int, int], tuple[int, int, Digests]] = {}

    def of(self, place: Place) -> Digests | None:
        """The digests of what is there, if it was handed out and filled as ``place`` says."""
        generation, fill, pair = self._pages.get((place.group, place.block), (-1, -1, None))
        return pair if (generation, fill) == (place.generation, place.fill) else None

    def learn(self, places: Sequence[Place], pairs: Sequence[Digests]) -> None:
        """These places hold these pages."""
        with self._lock:
            for place, pair in zip(places, pairs, strict=True):
                self._pages[place.group, place.block] = place.generation, place.fill, pair

    def forget(self, places: Iterable[Place]) -> None:
        """These places are about to be overwritten."""
        with self._lock:
            for place in places:
                self._pages.pop((place.group, place.block), None)


@dataclass(slots=True)
class _Capture:
    """A capture under way. Touched by the engine's thread; `Future`s carry what others do for it."""

    plan: CapturePlan
    known: Future[dict[tuple[int, int], Digests]]
    left: list[Place] | None = None
    stored: list[Future[None]] = field(default_factory=list)
    digests: dict[tuple[int, int], Digests] = field(default_factory=dict)
    gone: set[tuple[int, int]] = field(default_factory=set)
    copied: int = 0
    new_bytes: int = 0
    manifests: Future[list[str]] | None = None


class Captures:
    """The captures of one rank.

    Attributes:
        pages_captured: pages copied out since the start.
        bytes_captured: bytes of them that the repository did not have.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        groups: Sequence[GroupPages],
        pool: HostPool,
        known: Known,
        repo: Callable[[], Repository],
        numerics: Callable[[], dict[str, Any]],
    ) -> None:
        self.pages_captured = self.bytes_captured = 0
        self._layouts, self._groups, self._pool, self._known = layouts, groups, pool, known
        self._repo, self._numerics = repo, numerics
        self._running: dict[str, _Capture] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kvist-write", initializer=unbind)

    def begin(self, plan: CapturePlan) -> None:
        """Note what a capture shall hold."""
        candidates = {(place.group, place.block): pair for place in plan.places if (pair := self._known.of(place))}
        self._running[plan.id] = _Capture(plan, self._writer.submit(self._still_stored, candidates))

    def _still_stored(self, candidates: dict[tuple[int, int], Digests]) -> dict[tuple[int, int], Digests]:
        """In a thread: those whose pages the repository holds whole; a gc, or damage, may have taken some."""
        pages = self._repo().pages
        pages.refresh()
        return {
            key: pair
            for key, pair in candidates.items()
            if pages.size(pair[0]) is not None and pages.size(pair[1]) is not None
        }

    def hurry(self, capture_id: str) -> None:
        """Copy what the repository may hold already, rather than wait to hear of it behind what is being stored.

        For an engine that stands still; what turns out to be there is not stored again.
        """
        capture = self._running[capture_id]
        if not capture.known.done():
            capture.known.cancel()
            capture.known = Future()
            capture.known.set_result({})

    def copy(self, capture_id: str, gone: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Copy some more pages out of the cache; the engine stands still meanwhile.

        Args:
            capture_id: see `begin`.
            gone: (group, block) of pages whose block was reused since; they drop out of the capture.
        """
        capture = self._running[capture_id]
        capture.gone |= {(group, block) for group, block in gone}
        if not capture.known.done():
            return {"left": len(capture.plan.places), "busy": True}
        if capture.left is None:
            known = capture.known.result()
            capture.digests.update(known)
            capture.left = [place for place in capture.plan.places if (place.group, place.block) not in known]
            capture.left.sort(key=lambda place: (place.group, place.block), reverse=True)
        copied = 0
        while capture.left and copied < _CHUNK:
            group = self._groups[capture.left[-1].group]
            part = [place for place in capture.left[-self._most(group) :] if place.group == capture.left[-1].group]
            slots = self._pool.take(len(part), wait=False)
            if not slots:
                break
            part = part[::-1][: len(slots)]
            del capture.left[-len(part) :]
            whole = [place for place in part if (place.group, place.block) not in capture.gone]
            self._pool.release(slots[len(whole) :])
            if whole:
                slots = slots[: len(whole)]
                done = group.read([place.block for place in whole], self._pool.rows, slots)
                stored = self._writer.submit(self._store_pages, capture, group, whole, slots, done)
                # Not in the thread: what `close` cancels is never run, and whoever waits for slots would wait for ever.
                stored.add_done_callback(partial(self._give_back, slots))
                capture.stored.append(stored)
            copied += len(part) * group.page_bytes
        return {"left": len(capture.left), "busy": copied == 0 and bool(capture.left)}

    def _most(self, group: GroupPages) -> int:
        return max(1, _CHUNK // group.page_bytes)

    def _give_back(self, slots: Sequence[int], _: Future[None]) -> None:
        self._pool.release(slots)

    def _store_pages(
        self, capture: _Capture, group: GroupPages, places: Sequence[Place], slots: Sequence[int], done: Done
    ) -> None:
        """In a thread: hash and write what was copied."""
        done.wait()
        put = self._repo().put_pages(self._pool.halves(slots, group.layout.page_bytes))
        pairs = list(zip(put.digests[::2], put.digests[1::2], strict=True))
        for place, slot, pair in zip(places, slots, pairs, strict=True):
            self._pool.name(slot, pair)
            capture.digests[place.group, place.block] = pair
        capture.copied += len(places)
        capture.new_bytes += put.new_bytes
        self.pages_captured += len(places)
        self.bytes_captured += put.new_bytes
        self._known.learn(places, pairs)

    def finish(self, capture_id: str) -> dict[str, Any]:
        """The manifests' cids, once all is stored; poll until ``done``.

        Raises:
            StoreFull, …: what storing raised.
        """
        capture = self._running[capture_id]
        if capture.manifests is None and all(future.done() for future in capture.stored):
            for future in capture.stored:
                future.result()
            capture.manifests = self._writer.submit(self._put_manifests, capture)
        if capture.manifests is None or not capture.manifests.done():
            return {"done": False}
        manifests = capture.manifests.result()
        return {
            "done": True,
            "manifests": manifests,
            "pages": len(capture.digests),
            "pages_copied": capture.copied,
            "new_bytes": capture.new_bytes,
        }

    def release(self, capture_id: str) -> None:
        """Forget a capture. What it has stored serves the next one."""
        self._running.pop(capture_id, None)

    def _put_manifests(self, capture: _Capture) -> list[str]:
        manifests = []
        for number, layout in enumerate(self._layouts):
            held = {place.block: place for place in capture.plan.places if place.group == number}
            entries = tuple(
                PageEntry(block, *capture.digests[number, block], held[block].name)
                for block in held
                if (number, block) in capture.digests
            )
            size = layout.page_size_tokens
            sequences = tuple(_logical(sequence, number, size) for sequence in capture.plan.sequences)
            manifests.append(Manifest(layout, entries, sequences, self._numerics()))
        self._repo().objects.put_manifests(manifests)
        return [manifest.cid for manifest in manifests]

    def close(self) -> None:
        """Stop the thread."""
        self._writer.shutdown(cancel_futures=True)


def _logical(sequence: SequencePlan, group: int, size: int) -> LogicalSeq:
    first, blocks = sequence.blocks[group]
    fill = sequence.cached % size if blocks else 0
    return LogicalSeq(
        sequence.id, tuple(blocks), fill, tuple(sequence.token_ids), sequence.state, first_page=first if blocks else 0
    )
