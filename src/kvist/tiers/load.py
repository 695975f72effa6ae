"""`Loader`: blocks on their way up, from a worker's tiers to its device. What a load needs is taken first, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack
from enum import StrEnum

from kvist.blocks import BlockManager
from kvist.blocks.resident import Resident
from kvist.errors import Conflict, InvalidInput, NotFound, PoolExhausted
from kvist.tiers.ascent import Ascent
from kvist.tiers.config import TiersConfig
from kvist.tiers.level import Level, TierStats
from kvist.tiers.links import Network


class LoadState(StrEnum):
    """How far a load is."""

    NOTHING = "nothing"
    """No tier below holds the next block, or the device has no room for what they hold: do without."""
    BLOCKED = "blocked"
    """Room is being made on the device by copying evicted blocks down: ask again when that is done."""
    RUNNING = "running"
    """Blocks are on their way."""
    DONE = "done"
    """They are inactive blocks of the device, as many of them as `Load.brought` says."""


class Load:
    """One answer to a request for blocks.

    Attributes:
        state: how far it is.
        blocks: how many blocks are, or were, on their way up; 0 if it never ran.
        brought: how many of them, from the first, the device took; 0 until the load is done. Fewer than ``blocks`` if
            the device meanwhile came to hold a block under the same hash that has another block before it.
        ended_at: milliseconds; ``None`` until it is done.
    """

    def __init__(self, state: LoadState, blocks: int = 0) -> None:
        self.state = state
        self.blocks = blocks
        self.brought = 0
        self.ended_at: float | None = None
        self._callbacks: list[Callable[[Load], None]] = []

    def then(self, callback: Callable[[Load], None]) -> None:
        """Have ``callback`` called when this load is done, at that moment, in the network's `advance`.

        All callbacks are called, in the order in which they came here, even if one raises.

        Raises:
            Conflict: the load is not running.
        """
        if self.state is not LoadState.RUNNING:
            raise Conflict(f"a callback waits for a running load; this one is {self.state}")
        self._callbacks.append(callback)

    def _end(self, now: float) -> None:
        self.state = LoadState.DONE
        self.ended_at = now
        with ExitStack() as calls:
            while self._callbacks:
                calls.callback(self._callbacks.pop(), self)


class Loader:
    """The way up.

    Args:
        manager: of the device.
        levels: the tiers below it, from the top.
        config: sizes.
        stats: what is counted, one for each level.
        network: the clock of the levels' links.
    """

    def __init__(
        self,
        manager: BlockManager,
        levels: Sequence[Level],
        config: TiersConfig,
        stats: Sequence[TierStats],
        network: Network,
    ) -> None:
        self._manager = manager
        self._levels = levels
        self._config = config
        self._stats = stats
        self._network = network
        self._coming: dict[int, Load] = {}  # by the lineage hash of each block that is on its way
        self._slots: set[int] = set()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return not self._coming

    @property
    def lent_slots(self) -> Set[int]:
        """The device's slots that are being filled."""
        return self._slots

    def load(self, hashes: Sequence[int], keys: Sequence[int], above: Sequence[int | None]) -> Load:
        """See `kvist.tiers.Tiers.load`.

        Args:
            hashes: the chain.
            keys: lineage hash of each.
            above: lineage hash of the block before each, as the caller names it.
        """
        known = self._manager.peek(hashes)
        if known < len(keys) and (running := self._coming.get(keys[known])) is not None:
            return running
        run = self._find(keys, above, known)
        if not run:
            return Load(LoadState.NOTHING)
        prefix = hashes[:known]
        self._manager.match(prefix)
        self._pin(run)
        try:
            slots = self._manager.allocate(len(run))
        except PoolExhausted:
            state = LoadState.NOTHING
        except BaseException:  # a sink of events
            self._let_go(run, prefix)
            raise
        else:
            state = LoadState.RUNNING if slots else LoadState.BLOCKED
        if state is not LoadState.RUNNING:
            self._let_go(run, prefix)
            return Load(state)
        load = Load(state, len(run))
        self._coming.update((block.lineage_hash, load) for _, block in run)
        self._slots.update(slots)
        for number, _ in run:
            self._stats[number].hits += 1
        origins = [number for number, _ in run]
        Ascent(self._levels, self._stats, self._config, origins, lambda: self._done(load, run, prefix, slots))
        return load

    def check_integrity(self) -> None:
        """Check that what is on its way has room above and is kept below.

        Raises:
            AssertionError: it has not, or is not: a bug of ours.
        """
        assert len(self._slots) == len(self._coming)
        for key, load in self._coming.items():
            assert load.state is LoadState.RUNNING
            assert any(level.pool.readers(key) for level in self._levels)

    def _find(self, keys: Sequence[int], above: Sequence[int | None], start: int) -> list[tuple[int, Resident]]:
        """What lies below from ``start`` on and is not coming: of each block the highest level, and itself."""
        run: list[tuple[int, Resident]] = []
        for place in range(start, len(keys)):
            found = next(
                ((n, block) for n, level in enumerate(self._levels) if (block := level.pool.get(keys[place]))), None
            )
            if found is None or keys[place] in self._coming:
                break
            parent = found[1].lineage_parent
            before = keys[place - 1] if place else None
            if parent != before and not (parent is None and above[place] is None):
                raise InvalidInput(
                    f"a chain to load begins at its root: block {keys[place]} comes after {parent}, not {before}"
                )
            run.append(found)
        return run

    def _pin(self, run: Sequence[tuple[int, Resident]]) -> None:
        for number, level in enumerate(self._levels):
            level.pool.pin([block.lineage_hash for at, block in run if at == number])

    def _unpin(self, run: Sequence[tuple[int, Resident]]) -> None:
        for number, level in enumerate(self._levels):
            level.pool.unpin([block.lineage_hash for at, block in run if at == number])

    def _let_go(self, run: Sequence[tuple[int, Resident]], prefix: Sequence[int]) -> None:
        self._unpin(run)
        self._manager.deref(prefix[::-1])  # tail first, as sequences do

    def _done(
        self, load: Load, run: Sequence[tuple[int, Resident]], prefix: Sequence[int], slots: Sequence[int]
    ) -> None:
        blocks = [block for _, block in run]
        for block in blocks:
            del self._coming[block.lineage_hash]
        self._slots.difference_update(slots)
        with ExitStack() as ending:  # all of it, whatever a sink of events does
            ending.callback(load._end, self._network.now)
            ending.callback(self._let_go, run, prefix)
            self._register(load, blocks, slots, prefix[-1] if prefix else None)

    def _register(self, load: Load, blocks: Sequence[Resident], slots: Sequence[int], parent: int | None) -> None:
        """Put the longest leading part that contradicts nothing on the device; free the slots of the rest."""
        for count in range(len(blocks), -1, -1):
            load.brought = count
            try:
                self._manager.register(blocks[:count], slots[:count], parent=parent)
                return
            except InvalidInput as error:
                try:
                    self._manager.free(slots[count - 1 : count])
                except NotFound:  # the slot is used up: it was not the manager that refused
                    raise error from None
