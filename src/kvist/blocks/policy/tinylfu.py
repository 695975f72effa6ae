"""A count-min sketch that forgets: how often each of many keys was used lately, in 4 bytes for each of them.

G. Einziger, R. Friedman, B. Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions on Storage
13 (4), 2017; in the sizes of NVIDIA Dynamo's kvbm-logical. Its hashes are others: they choose a counter within a word
of 16 by the bits that chose the word, and so a 16th of its counters is used when 64 divides the capacity. Our four are
made of two (A. Kirsch, M. Mitzenmacher, "Less Hashing, Same Performance: Building a Better Bloom Filter", ESA 2006).
"""

from __future__ import annotations

import xxhash

_COUNTERS = 4  # for each key of the capacity
MOST = 15
"""What a counter counts at most."""
_WORD = 1 << 63
_LOW = (1 << 32) - 1
_HALF = bytes(count // 2 for count in range(256))
_ODD = bytes(count % 2 for count in range(256))


def key_bytes(key: int | bytes) -> bytes:
    """What of a key is hashed: bytes as they are; of integers two's complement, little-endian, in 8 bytes or more."""
    if isinstance(key, bytes):
        return key
    if -_WORD < key < _WORD:
        return key.to_bytes(8, "little", signed=True)
    return key.to_bytes(key.bit_length() // 8 + 1, "little", signed=True)


class TinyLfu:
    """Counts uses. An estimate is never less than the uses since the last halving, up to 15; it may be more.

    Every count is halved after 10 uses for each key of the capacity. Uses of keys that are at 15 do not count for that.

    O(1) for each count and estimate; halving is O(capacity). It remembers where the counters of some keys are, of as
    many as the capacity.

    Args:
        capacity: how many keys are told apart well, 1 or more.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        size = _COUNTERS * capacity
        self._counters = bytearray(size)
        self._clashing = frozenset({0, size / 2, size / 3, 2 * size / 3})  # steps that come to a counter again
        self._period = 10 * capacity
        self._counted = 0
        self._known: dict[int | bytes, tuple[int, ...]] = {}

    def count(self, *keys: int | bytes) -> None:
        """Note one use of each."""
        counters, known = self._counters, self._known
        for key in keys:
            is_rising = False
            for place in known.get(key) or self._places(key):
                if (uses := counters[place]) < MOST:
                    counters[place] = uses + 1
                    is_rising = True
            if is_rising:
                self._counted += 1
                if self._counted >= self._period:
                    odd = sum(counters.translate(_ODD))
                    counters = self._counters = counters.translate(_HALF)
                    self._counted = self._counted // 2 - odd // 4

    def estimate(self, key: int | bytes) -> int:
        """How often it was used, lately: 0 to 15."""
        counters = self._counters
        least = MOST
        for place in self._known.get(key) or self._places(key):
            if (uses := counters[place]) < least:
                least = uses
        return least

    def _places(self, key: int | bytes) -> tuple[int, ...]:
        """Where the counters of a key are, each once."""
        digest = xxhash.xxh3_64_intdigest(key_bytes(key))
        size = len(self._counters)
        first, step = (digest & _LOW) % size, (digest >> 32) % size
        places: tuple[int, ...] = first, (first + step) % size, (first + 2 * step) % size, (first + 3 * step) % size
        if step in self._clashing:
            places = tuple(set(places))
        if len(self._known) >= self._capacity:
            self._known.clear()
        self._known[key] = places
        return places
