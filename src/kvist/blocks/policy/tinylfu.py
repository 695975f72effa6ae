"""A count-min sketch that forgets: how often each of many keys was used lately, in 4 bytes for each of them.

G. Einziger, R. Friedman, B. Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM Transactions on Storage
13 (4), 2017; in the sizes of NVIDIA Dynamo's kvbm-logical. Its hashes are others: they choose a counter within a word
of 16 by the bits that chose the word, and so a 16th of its counters is used when 64 divides the capacity. Our four are
made of two (A. Kirsch, M. Mitzenmacher, "Less Hashing, Same Performance: Building a Better Bloom Filter", ESA 2006).
"""

from __future__ import annotations

import xxhash

_COUNTERS = 4  # for each key of the capacity
_MOST = 15  # that a counter counts
_HALF = bytes(count // 2 for count in range(256))
_ODD = bytes(count % 2 for count in range(256))


def key_bytes(key: int | bytes) -> bytes:
    """What of a key is hashed: bytes as they are; of integers two's complement, little-endian, in 8 bytes or more."""
    if isinstance(key, bytes):
        return key
    return key.to_bytes(max(8, key.bit_length() // 8 + 1), "little", signed=True)


class TinyLfu:
    """Counts uses. An estimate is never less than the uses since the last halving, up to 15; it may be more.

    Every count is halved after 10 uses for each key of the capacity. Uses of keys that are at 15 do not count for that.

    O(1) for each count and estimate; halving is O(capacity).

    Args:
        capacity: how many keys are told apart well, 1 or more.
    """

    def __init__(self, capacity: int) -> None:
        self._counters = bytearray(_COUNTERS * capacity)
        self._period = 10 * capacity
        self._counted = 0

    def count(self, key: int | bytes) -> None:
        """Note one use."""
        counters = self._counters
        rising = [place for place in self._places(key) if counters[place] < _MOST]
        if not rising:
            return
        for place in rising:
            counters[place] += 1
        self._counted += 1
        if self._counted >= self._period:
            odd = sum(counters.translate(_ODD))
            self._counters = counters.translate(_HALF)
            self._counted = self._counted // 2 - odd // 4

    def estimate(self, key: int | bytes) -> int:
        """How often it was used, lately: 0 to 15."""
        return min(self._counters[place] for place in self._places(key))

    def _places(self, key: int | bytes) -> set[int]:
        step, first = divmod(xxhash.xxh3_64_intdigest(key_bytes(key)), 1 << 32)
        size = len(self._counters)
        return {first % size, (first + step) % size, (first + 2 * step) % size, (first + 3 * step) % size}
