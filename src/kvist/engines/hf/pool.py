"""The pool: slots, who refers to them, which block each holds, and which to evict first.

Knows pages and block hashes. Must not know sequences, models or threads: callers see to it that one thread at a time
is in here.

A slot is in one of three states: *free* (no data), *held* (one or more references) or *cached* (no reference, but it
holds a full block that a later prompt may ask for). Cached slots are evicted least recently used first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvist.errors import PoolExhausted
from kvist.layout import Layout

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""Torch's dtype for each layout dtype this engine can hold."""


class PagePool:
    """A bounded set of page slots on one device.

    Attributes:
        data: ``[slots, 2, layers, tokens, heads, head_dim]``: a slot's K half, then its V half, each one contiguous
            run in the memory order LNHD.
        refs: references to each slot.
        filled: rows of each slot that hold computed keys and values; the others are zeros.
        pinned: references that pagers hold, by slot (they count in ``refs`` too).
        evictions: cached pages evicted so far.
    """

    def __init__(self, layout: Layout, slots: int, device: str | torch.device = "cpu") -> None:
        shape = (slots, 2, layout.n_layers, layout.page_size_tokens, layout.n_heads, layout.head_dim)
        self.data: Tensor = torch.zeros(shape, dtype=DTYPES[layout.dtype], device=device)
        self.page_size = layout.page_size_tokens
        self.refs = [0] * slots
        self.filled = [0] * slots
        self.pinned: Counter[int] = Counter()
        self.evictions = 0
        self._free = list(range(slots - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[int, bytes] = {}
        self._slots_of: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def available(self) -> int:
        """Slots that `take` could return now."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> list[int]:
        """Slots kept only as prefix cache, the next to be evicted first."""
        return list(self._cached)

    def take(self, count: int) -> list[int]:
        """Take ``count`` slots, zeroed, with one reference each; all or nothing.

        Raises:
            PoolExhausted: too few are free or cached.
        """
        if count > self.available:
            raise PoolExhausted(f"needed {count} slots of {len(self)}, and {self.available} are free or evictable")
        slots: list[int] = []
        while len(slots) < count:
            if self._free:
                slot = self._free.pop()
            else:
                slot, _ = self._cached.popitem(last=False)
                self._forget(slot)
                self.evictions += 1
            slots.append(slot)
            self.refs[slot] = 1
        stale = [slot for slot in slots if self.filled[slot]]
        if stale:
            self.data[stale] = 0
        for slot in stale:
            self.filled[slot] = 0
        return slots

    def hold(self, slot: int) -> int:
        """Add a reference to a held or cached slot, and return it."""
        assert self.refs[slot] or slot in self._cached
        self._cached.pop(slot, None)
        self.refs[slot] += 1
        return slot

    def release(self, slots: Iterable[int]) -> None:
        """Take one reference off each slot; one without references is cached if it holds a block, else free."""
        for slot in slots:
            assert self.refs[slot] > 0
            self.refs[slot] -= 1
            if self.refs[slot]:
                continue
            block = self._block_of.get(slot)
            if block is not None and len(self._slots_of[block]) == 1:
                self._cached[slot] = None
            else:
                self._forget(slot)
                self._free.append(slot)

    def writable(self, slot: int, rows: int) -> int:
        """A slot that holds the first ``rows`` rows of ``slot`` and zeros, and that nobody else sees: copy on write.

        The caller's reference to ``slot`` moves to the slot returned.

        Raises:
            PoolExhausted: a copy is needed and there is no slot for it; nothing changed.
        """
        if self.refs[slot] == 1:
            self._forget(slot)
            self.trim(slot, rows)
            return slot
        (copy,) = self.take(1)
        self.data[copy, :, :, :rows] = self.data[slot, :, :, :rows]
        self.filled[copy] = rows
        self.release([slot])
        return copy

    def pinned_only(self) -> bool:
        """Are there slots that nobody but pagers holds?"""
        return any(count and self.refs[slot] == count for slot, count in self.pinned.items())

    def trim(self, slot: int, rows: int) -> None:
        """Zero all but the first ``rows`` rows."""
        if self.filled[slot] > rows:
            self.data[slot, :, :, rows:] = 0
        self.filled[slot] = rows

    def register(self, slot: int, block: bytes) -> None:
        """Say that a held slot is full and holds ``block``."""
        assert self.refs[slot] and slot not in self._block_of
        self._block_of[slot] = block
        self._slots_of.setdefault(block, []).append(slot)

    def find(self, block: bytes) -> int | None:
        """A slot that holds ``block``, or ``None``."""
        slots = self._slots_of.get(block)
        return slots[0] if slots else None

    def block(self, slot: int) -> bytes | None:
        """The hash of the block in ``slot``, or ``None`` where it is not full."""
        return self._block_of.get(slot)

    def blocks(self) -> list[int]:
        """Slots that hold a full block, held or cached."""
        return list(self._block_of)

    def clear_cached(self) -> int:
        """Free every slot kept only as prefix cache; how many there were."""
        slots = self.cached
        for slot in slots:
            self._forget(slot)
        self._free.extend(slots)
        self._cached.clear()
        return len(slots)

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Raise `AssertionError` unless references, states and the index agree with ``tables`` and ``pinned``."""
        held = Counter(slot for table in tables for slot in table) + self.pinned
        assert [held[slot] for slot in range(len(self))] == self.refs, "references do not add up"
        states = [*self._free, *self._cached, *(slot for slot in range(len(self)) if self.refs[slot])]
        assert sorted(states) == list(range(len(self))), "a slot is in no state, or in two"
        indexed = sorted(slot for slots in self._slots_of.values() for slot in slots)
        assert indexed == sorted(self._block_of), "the index and its inverse differ"
        for slot, block in self._block_of.items():
            assert slot in self._slots_of[block] and self.filled[slot] == self.page_size, f"slot {slot} is not full"
        assert all(slot in self._block_of for slot in self._cached), "a cached slot holds no block"
        assert not any(slot in self._block_of for slot in self._free), "a free slot holds a block"
        for slot in range(len(self)):
            assert not self.data[slot, :, :, self.filled[slot] :].any(), f"slot {slot} holds stale rows"

    def _forget(self, slot: int) -> None:
        block = self._block_of.pop(slot, None)
        if block is not None:
            slots = self._slots_of[block]
            slots.remove(slot)
            if not slots:
                del self._slots_of[block]
