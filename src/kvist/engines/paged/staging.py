"""Host memory that pages pass through between an engine's cache and a store, and stay in while there is room.

Knows slots and keys. Must not know engines, files or block tables.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch

from kvist.errors import InvalidInput


class HostPool:
    """Equal slots of host memory; one that holds a named page and is in no use is a cache entry, dropped oldest first.

    Every slot that a method returns is pinned for the caller until `release`. Thread-safe.

    Attributes:
        rows: the memory, uint8 ``[slots, slot_bytes]``; page-locked if asked for.
    """

    def __init__(self, nbytes: int, slot_bytes: int, *, page_locked: bool = False) -> None:
        if not 0 < slot_bytes <= nbytes:
            raise InvalidInput(f"host_bytes: expected room for a page of {slot_bytes} bytes at least, got {nbytes}")
        self.rows = torch.empty((nbytes // slot_bytes, slot_bytes), dtype=torch.uint8, pin_memory=page_locked)
        if not page_locked:
            self.rows.zero_()  # resident from now on: the first touch of a page costs as much as reading it verified
        self._free = list(range(len(self.rows) - 1, -1, -1))
        self._pins = [0] * len(self.rows)
        self._slot: dict[Hashable, int] = {}
        self._key: dict[int, Hashable] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, key: Hashable) -> int | None:
        """The slot that holds a page, pinned; ``None`` if none does."""
        with self._changed:
            slot = self._slot.get(key)
            if slot is not None:
                self._idle.pop(slot, None)
                self._pins[slot] += 1
            return slot

    def take(self, count: int, *, wait: bool) -> list[int]:
        """Slots to fill, pinned: up to ``count`` of them, at least one if ``wait``, in ascending order.

        Waiting ends when another thread releases a slot. A caller that holds slots itself may wait only while no other
        such caller does, and while it holds a part of the pool.
        """
        with self._changed:
            while wait and not self._free and not self._idle:
                self._changed.wait()
            taken: list[int] = []
            while len(taken) < count and (self._free or self._idle):
                if self._free:
                    slot = self._free.pop()
                else:
                    slot, _ = self._idle.popitem(last=False)
                    del self._slot[self._key.pop(slot)]
                self._pins[slot] = 1
                taken.append(slot)
            return sorted(taken)

    def name(self, slot: int, key: Hashable) -> None:
        """Say which page a pinned slot holds, so that `find` knows it. A page that another slot holds stays there."""
        with self._changed:
            if key not in self._slot:
                self._slot[key], self._key[slot] = slot, key

    def release(self, slots: Sequence[int]) -> None:
        """Undo one pin of each slot."""
        with self._changed:
            for slot in slots:
                self._pins[slot] -= 1
                if self._pins[slot] == 0:
                    if slot in self._key:
                        self._idle[slot] = None
                    else:
                        self._free.append(slot)
            self._changed.notify_all()

    def view(self, slot: int, nbytes: int) -> memoryview:
        """The first bytes of a pinned slot, writable; valid while it is pinned."""
        return memoryview(self.rows[slot, :nbytes].numpy())  # type: ignore[arg-type]

    def halves(self, slots: Sequence[int], half: int) -> list[memoryview]:
        """The K half, then the V half, of the page in each pinned slot, writable; of ``half`` bytes each."""
        views = [self.view(slot, 2 * half) for slot in slots]
        return [part for view in views for part in (view[:half], view[half:])]


def unbind() -> None:
    """Let the calling thread run on any core: engines bind theirs to some, and every new thread inherits that."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
