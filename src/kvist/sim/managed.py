"""The device's pool under one of kvist's eviction policies: the `BlockManager` that live engines use.

`ManagedPool` offers the scheduler what `kvist.sim.pool.SlotPool` offers. Two things differ, as the block manager
differs from vLLM's pool: a content lies in one slot only, and where tiers below read evicted blocks, a slot may have to
be waited for.
"""

from __future__ import annotations

import numpy as np

from kvist.blocks import BlockManager, Event, Removed, Stored, Tier
from kvist.sim.config import EngineConfig
from kvist.sim.pool import Contents, Move, Slots

_LEVELS = {tier: level for level, tier in enumerate(Tier)}


class ManagedPool:
    """Slots of one device, kept by a `BlockManager`.

    A slot here is a handle: the content of a full block, or -1 less the slot of a block that is not full yet.

    Args:
        engine: sizes and policy.
        tell: whether to note what is stored and removed.
    """

    def __init__(self, engine: EngineConfig, *, tell: bool = False) -> None:
        self.num_slots = engine.num_blocks
        self.num_evicted = 0
        self.moves: list[Move] = []
        self._tell = tell
        self.manager = BlockManager(engine.num_blocks, engine.block_size, engine.eviction, self._heard)
        self._kept: list[int] = []  # slots that are lent, and wait to be taken

    @property
    def num_free(self) -> int:
        """Slots that nobody holds, some of them perhaps to be waited for."""
        return self.num_slots - self.num_used

    @property
    def num_sure(self) -> int:
        """Slots that can be taken without waiting."""
        return len(self._kept) + self.manager.num_free_blocks if self.manager.has_offload else self.num_free

    @property
    def num_used(self) -> int:
        """Slots that sequences hold, and what copies hold for now."""
        return self.manager.num_active_blocks - len(self._kept)

    def find(self, contents: Contents) -> Slots:
        """The leading contents that are here; nothing is moved or held."""
        return contents[: self.manager.peek(contents.tolist())].astype(np.int32)

    def num_held(self, found: Slots) -> int:
        """How many of these somebody holds."""
        return sum(self.manager.refs(content) > 0 for content in found.tolist())

    def prepare(self, n: int) -> bool:
        """Make room for slots to take; returns whether there is, or it must be waited for. There are as many free."""
        if (short := n - len(self._kept)) > 0:
            self._kept.extend(self.manager.allocate(short))
        return n <= len(self._kept)

    def acquire(self, found: Slots, fresh: int) -> Slots | None:
        """Hold found contents and so many fresh slots, or nothing: None where too few can be had now."""
        held = found.tolist()
        if fresh > self.num_free - (len(held) - self.num_held(found)):
            return None
        self.manager.match(held)
        if not self.prepare(fresh):
            self.manager.deref(held[::-1])
            return None
        taken, self._kept = self._kept[:fresh], self._kept[fresh:]
        return -1 - np.array(taken, dtype=np.int32)

    def cache(self, slots: Slots, chain: Contents) -> Slots:
        """The last blocks of a chain are full, and lie in these held slots; returns their slots from now on."""
        contents = chain[len(chain) - len(slots) :]
        parent = int(chain[-len(slots) - 1]) if len(chain) > len(slots) else None
        self.manager.free((-1 - slots).tolist())
        used = self.manager.use(contents.tolist(), parent=parent)
        assert used == len(contents), "the slots were free"
        return contents.astype(np.int32)

    def release(self, slots: Slots) -> None:
        """Give slots back, what may be evicted first coming first."""
        self.manager.free((-1 - slots[slots < 0]).tolist())
        self.manager.deref(slots[slots >= 0].tolist())

    def _heard(self, event: Event) -> None:
        data = event.data
        assert isinstance(data, Stored | Removed), "a replay clears no pool"
        is_stored = isinstance(data, Stored)
        if event.tier is Tier.DEVICE and not is_stored:
            self.num_evicted += len(data.hashes)
        if self._tell:
            self.moves.append((is_stored, np.array(data.hashes, dtype=np.int64), _LEVELS[event.tier]))
