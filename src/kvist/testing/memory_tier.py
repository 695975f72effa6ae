"""`MemoryTier` and `LyingTier`: page tiers that stand in for one, well or unwell."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

from kvist.errors import StoreError
from kvist.hashing import Buffer
from kvist.repo.tier import PageTier
from kvist.repo.tier.base import Clock


class MemoryTier(PageTier):
    """Pages in a dict.

    Attributes:
        pages: what it holds.
        fails: raised by every call while it is set.
    """

    def __init__(self, **settings: Clock) -> None:
        super().__init__(**settings)
        self.pages: dict[str, bytes] = {}
        self.fails: Exception | None = None

    @property
    def url(self) -> str:
        """Opens nothing."""
        return f"memory:{id(self)}"

    def _read(self, names: Sequence[str], outs: Sequence[memoryview]) -> list[bool]:
        self._fail()
        found = []
        for name, out in zip(names, outs, strict=True):
            data = self.pages.get(name)
            found.append(data is not None and len(data) == len(out))
            if data is not None and found[-1]:
                out[:] = data
        return found

    def _write(self, items: Sequence[tuple[str, Buffer]]) -> list[str]:
        self._fail()
        self.pages.update((name, bytes(data)) for name, data in items)
        return [name for name, _ in items]

    def _forget(self, names: Sequence[str]) -> None:
        self._fail()
        for name in names:
            self.pages.pop(name, None)

    def _fail(self) -> None:
        if self.fails is not None:
            raise self.fails


class LyingTier(MemoryTier):
    """Gives, takes and refuses at random: wrong bytes, half-filled buffers that it calls missing, and failures."""

    def __init__(self, seed: int, **settings: Clock) -> None:
        super().__init__(**settings)
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def _read(self, names: Sequence[str], outs: Sequence[memoryview]) -> list[bool]:
        found = super()._read(names, outs)
        with self._lock:
            for i, out in enumerate(outs):
                match self._chance.randrange(6):
                    case 0:
                        out[self._chance.randrange(len(out))] ^= 1
                    case 1:
                        out[:] = bytes(len(out))
                        found[i] = True
                    case 2:
                        out[: len(out) // 2] = bytes(len(out) // 2)
                        found[i] = False
        return found

    def _fail(self) -> None:
        with self._lock:
            if self._chance.randrange(8) == 0:
                raise StoreError("the tier is not well")
