"""The device's pool as vLLM keeps it, for simulation: arrays of slots, and one queue of what may be evicted.

It knows contents by interned numbers (see `kvist.sim.chains`), and no tokens, times or requests. A content may lie in
several slots at once: vLLM computes the last block of a prompt anew even where it is cached, and keeps both. Rules:
slots that hold nothing are taken first, then the least recently used slot that nobody holds; the slots of a sequence
are given back from its end, so that a chain loses its tail before its head.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Contents = NDArray[np.int64]
Slots = NDArray[np.int32]
Move = tuple[bool, Contents, int]  # stored, or else removed; what; in which tier: 0 is the device

_NO_SLOTS: Slots = np.empty(0, dtype=np.int32)


class SlotPool:
    """Slots of one device.

    Args:
        num_slots: 1 or more.
        num_contents: contents are 0 up to this.
        tell: whether to note what is stored and removed.
    """

    def __init__(self, num_slots: int, num_contents: int, *, tell: bool = False) -> None:
        self.num_slots = num_slots
        self.num_free = num_slots  # slots that nobody holds
        self.num_evicted = 0
        self.moves: list[Move] = []  # in order; whoever reads them empties the list
        self._tell = tell
        self._content = np.full(num_slots, -1, dtype=np.int64)
        self._refs = np.zeros(num_slots, dtype=np.int32)
        self._place = np.full(num_slots, -1, dtype=np.int64)  # where in the queue; -1: held, or blank
        self._slot = np.full(num_contents, -1, dtype=np.int32)  # the first slot of a content
        self._copies: dict[int, list[int]] = {}  # its other slots, oldest first
        self._blank = np.arange(num_slots - 1, -1, -1, dtype=np.int32)
        self._num_blank = num_slots
        # The queue only grows, and is read past what has moved on since; when it is full it is packed.
        self._queue = np.empty(4 * num_slots + 64, dtype=np.int32)
        self._numbers = np.arange(len(self._queue))
        self._head = self._tail = 0

    @property
    def num_sure(self) -> int:
        """Slots that can be taken without waiting: all that are free."""
        return self.num_free

    @property
    def num_used(self) -> int:
        """Slots that sequences hold."""
        return self.num_slots - self.num_free

    def grow(self, num_contents: int) -> None:
        """Make room for more contents."""
        if num_contents > len(self._slot):
            more = np.full(max(num_contents, 2 * len(self._slot)), -1, dtype=np.int32)
            more[: len(self._slot)] = self._slot
            self._slot = more

    def find(self, contents: Contents) -> Slots:
        """The slots of the leading contents that are here; nothing is moved or held."""
        slots = self._slot[contents]
        if len(slots) == 0:
            return slots
        missing = slots < 0
        first = int(missing.argmax())
        return slots[:first] if missing[first] else slots

    def num_held(self, slots: Slots) -> int:
        """How many of these slots somebody holds."""
        return int(np.count_nonzero(self._refs[slots]))

    def prepare(self, n: int) -> bool:
        """Whether slots that are free can be taken now: always."""
        return True

    def acquire(self, found: Slots, fresh: int) -> Slots | None:
        """Hold found slots and so many fresh ones, or nothing.

        Returns:
            The fresh slots, without content; None where too few can be had.
        """
        held = self._refs[found]
        idle = found[held == 0] if len(found) else found
        if fresh > self.num_free - len(idle):
            return None
        if len(found):
            self._refs[found] = held + 1
            self._place[idle] = -1
            self.num_free -= len(idle)
        return self._take(fresh) if fresh else _NO_SLOTS

    def cache(self, slots: Slots, chain: Contents) -> Slots:
        """The last blocks of a chain are full, and lie in these held slots; returns the slots."""
        contents, kept = chain[len(chain) - len(slots) :], slots
        self._content[slots] = contents
        known = self._slot[contents] >= 0
        if known.any():
            for content, slot in zip(contents[known].tolist(), slots[known].tolist(), strict=True):
                self._copies.setdefault(content, []).append(slot)
            slots, contents = slots[~known], contents[~known]
        self._slot[contents] = slots
        if self._tell and len(contents):
            self.moves.append((True, contents, 0))
        return kept

    def release(self, slots: Slots) -> None:
        """Give slots back, what may be evicted first coming first."""
        refs = self._refs[slots] - 1
        self._refs[slots] = refs
        idle = slots[refs == 0]
        self.num_free += len(idle)
        blank = self._content[idle] < 0
        if blank.any():
            empty = idle[blank]
            self._blank[self._num_blank : self._num_blank + len(empty)] = empty
            self._num_blank += len(empty)
            idle = idle[~blank]
        self._append(idle)

    def _take(self, n: int) -> Slots:
        blanks = min(n, self._num_blank)
        self._num_blank -= blanks
        slots = self._blank[self._num_blank : self._num_blank + blanks]
        slots = np.concatenate((slots, self._evict(n - blanks))) if blanks < n else slots.copy()
        self._refs[slots] = 1
        self.num_free -= n
        return slots

    def _evict(self, n: int) -> Slots:
        taken: list[Slots] = []
        while n:
            end = min(self._head + 2 * n + 32, self._tail)
            window = self._queue[self._head : end]
            waiting = (self._place[window] == self._numbers[self._head : end]).nonzero()[0][:n]
            found = window[waiting]
            taken.append(found)
            n -= len(found)
            self._head = end if n else self._head + int(waiting[-1]) + 1
        slots = taken[0] if len(taken) == 1 else np.concatenate(taken)
        self._place[slots] = -1
        self._forget(slots)
        return slots

    def _forget(self, slots: Slots) -> None:
        contents = self._content[slots]
        self._content[slots] = -1
        if self._copies:
            gone = [c for c, s in zip(contents.tolist(), slots.tolist(), strict=True) if self._forget_copy(c, s)]
            contents = np.array(gone, dtype=np.int64)
        else:
            self._slot[contents] = -1
        self.num_evicted += len(contents)
        if self._tell and len(contents):
            self.moves.append((False, contents, 0))

    def _forget_copy(self, content: int, slot: int) -> bool:
        """Whether this was the last slot of the content."""
        copies = self._copies.get(content)
        if copies is None:
            self._slot[content] = -1
            return True
        if self._slot[content] == slot:
            self._slot[content] = copies.pop(0)
        else:
            copies.remove(slot)
        if not copies:
            del self._copies[content]
        return False

    def _append(self, slots: Slots) -> None:
        end = self._tail + len(slots)
        if end > len(self._queue):
            self._pack()
            end = self._tail + len(slots)
        self._queue[self._tail : end] = slots
        self._place[slots] = self._numbers[self._tail : end]
        self._tail = end

    def _pack(self) -> None:
        old = self._queue[self._head : self._tail]
        waiting = old[self._place[old] == self._numbers[self._head : self._tail]]
        self._queue[: len(waiting)] = waiting
        self._place[waiting] = self._numbers[: len(waiting)]
        self._head, self._tail = 0, len(waiting)
