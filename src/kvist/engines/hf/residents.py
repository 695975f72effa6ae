"""Finished and restored sequences: by name, by age, and by the prefix that comes before each of their pages.

Knows sequences and block hashes. Must not know slots, models or turns: whoever adds and removes a sequence here holds
and releases its slots.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

from kvist.engines.hf.sequence import Sequence


class Residents:
    """Iterates least recently used first. A resident's tokens and table do not change."""

    def __init__(self, page_size: int) -> None:
        self._size = page_size
        self._by_id: OrderedDict[str, Sequence] = OrderedDict()
        self._followers: dict[bytes, dict[str, Sequence]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def get(self, sequence_id: str) -> Sequence | None:
        """The resident of that name, or ``None``."""
        return self._by_id.get(sequence_id)

    def add(self, seq: Sequence) -> None:
        """Put ``seq`` last."""
        assert seq.id not in self._by_id
        self._by_id[seq.id] = seq
        for key in self._keys(seq):
            self._followers.setdefault(key, {})[seq.id] = seq

    def remove(self, seq: Sequence) -> bool:
        """Take ``seq`` out; ``False`` if it is not in."""
        if self._by_id.get(seq.id) is not seq:
            return False
        del self._by_id[seq.id]
        for key in self._keys(seq):
            followers = self._followers[key]
            del followers[seq.id]
            if not followers:
                del self._followers[key]
        return True

    def touch(self, seq: Sequence) -> None:
        """Make ``seq`` the most recently used, if it is in."""
        if seq.id in self._by_id:
            self._by_id.move_to_end(seq.id)

    def after(self, prefix: bytes, most: int) -> list[Sequence]:
        """Residents with a page after ``prefix`` (see `Sequence.before`); of many, the ``most`` latest."""
        return list(islice(reversed(self._followers.get(prefix, {}).values()), most))

    def _keys(self, seq: Sequence) -> Iterator[bytes]:
        """What comes before each page that ``seq`` has and whose ids it knows."""
        pages = -(-min(seq.computed, len(seq.token_ids)) // self._size)
        yield from (seq.before(page, self._size) for page in range(pages))
