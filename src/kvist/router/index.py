"""`Index`: which worker holds which leading blocks of a prompt, and in which tier, as its events tell.

Blocks are found by the hashes of their tokens (``local_hashes``), which are the same for all workers; each worker's own
names for them (``hashes``) matter only to its events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

from kvist.blocks.events import Cleared, Event, Removed, Stored, Tier
from kvist.errors import AlreadyExists, InvalidInput, NotFound
from kvist.router.runs import Run, Tree, alike

Worker = int | str
Pool = tuple[Worker, int]

TIERS = tuple(Tier)
_REMEMBERED = 4096  # sets of pools whose members are kept as tuples


class Overlap(NamedTuple):
    """How far one pool can serve a prompt, in leading blocks. Each tier counts what the faster ones hold as well.

    Attributes:
        device: blocks on the device.
        host: on the device or in host memory.
        disk: on the device, in host memory or on disk.
        external: anywhere.
    """

    device: int
    host: int
    disk: int
    external: int


class Index:
    """What the events of all workers say, as one tree. Not thread safe.

    A pool is ``(worker, dp_rank)``; each has its own events. Applying a log from its start gives the blocks that its
    pool holds, tier by tier, whatever the order of the removals: a block whose parent has gone is not found, and is
    again when the parent is back.
    """

    def __init__(self) -> None:
        self._tree = Tree()
        self._shifts: dict[Pool, int] = {}  # of the pool's four bits
        self._pools: dict[int, Pool] = {}  # by shift
        self._devices = 0  # the lowest bit of every pool
        self._members: dict[int, tuple[Pool, ...]] = {}

    @property
    def pools(self) -> tuple[Pool, ...]:
        """All pools that were added or heard of."""
        return tuple(self._shifts)

    def add_worker(self, worker: Worker, dp_rank: int = 0) -> None:
        """Make a pool known that holds nothing. Its first event does the same.

        Raises:
            AlreadyExists: it is known.
            InvalidInput: a negative rank.
        """
        pool = (worker, dp_rank)
        if pool in self._shifts:
            raise AlreadyExists(f"the index has worker {worker!r}, rank {dp_rank}")
        if dp_rank < 0:
            raise InvalidInput(f"dp_rank must be 0 or more; got {dp_rank}")
        shift = next(shift for shift in count(0, len(TIERS)) if shift not in self._pools)
        self._shifts[pool] = shift
        self._pools[shift] = pool
        self._devices |= 1 << shift
        for bit in _bits(shift):
            self._tree.maps[bit] = {}

    def remove_worker(self, worker: Worker, dp_rank: int | None = None) -> None:
        """Forget a worker: one rank, or all.

        Raises:
            NotFound: it is unknown.
        """
        pools = self._pools_of(worker, dp_rank)
        for pool in pools:
            self._clear(pool)
            shift = self._shifts.pop(pool)
            del self._pools[shift]
            self._devices ^= 1 << shift
            for bit in _bits(shift):
                del self._tree.maps[bit]
        self._members.clear()

    def apply(self, worker: Worker, event: Event) -> None:
        """Take one event of a worker. What is stored again, or removed unknown, changes nothing.

        Raises:
            NotFound: a run's parent is unknown to the pool. Nothing has changed.
            InvalidInput: no local hashes, not one for each block, or a block twice in a run. Nothing has changed.
        """
        data = event.data
        pool = (worker, event.dp_rank)
        shift = self._shifts.get(pool)
        if shift is None:
            if isinstance(data, Stored):
                _checked(data)
                if data.parent is not None:
                    raise _unknown_parent(pool, data.parent)
            self.add_worker(*pool)
            shift = self._shifts[pool]
        bit = 1 << (shift if event.tier is Tier.DEVICE else shift + TIERS.index(event.tier))
        if isinstance(data, Stored):
            self._store(pool, bit, data)
        elif isinstance(data, Removed):
            self._tree.drop(bit, data.hashes)
        elif isinstance(data, Cleared):
            self._clear(pool)

    def find(self, local_hashes: Sequence[int]) -> dict[Pool, Overlap]:
        """How many leading blocks of this prompt each pool holds; pools without the first are left out."""
        children = self._tree.root.children
        prompt = tuple(local_hashes)
        depth, end = 0, len(prompt)
        steps: list[tuple[int, int]] = []  # who holds what follows this depth
        held = -1
        while depth < end:
            run = children.get(prompt[depth])
            if run is None:
                break
            if run.held != held:
                held = run.held
                if not held:
                    break
                steps.append((held, depth))
            blocks = run.blocks
            upto = depth + len(blocks)
            if prompt[depth:upto] != blocks:
                depth += alike(blocks, 0, prompt, depth)
                break
            depth = upto
            children = run.children
        return self._overlaps(steps, depth) if steps else {}

    def events_of(self, worker: Worker, dp_rank: int | None = None) -> list[Event]:
        """Events that tell an empty index all that this one knows of a worker; each rank's are numbered from 0.

        Blocks whose parent has gone come as a run that stands below names which are stored and removed again.

        Raises:
            NotFound: the worker is unknown.
        """
        return [event for pool in self._pools_of(worker, dp_rank) for event in self._told(pool)]

    def hashes_of(self, worker: Worker, dp_rank: int = 0, tier: Tier = Tier.DEVICE) -> frozenset[int]:
        """The names of the blocks that a pool holds in one tier, found or not.

        Raises:
            NotFound: the pool is unknown.
        """
        (pool,) = self._pools_of(worker, dp_rank)
        return frozenset(self._tree.maps[1 << self._shifts[pool] + TIERS.index(tier)])

    def num_blocks(self, worker: Worker, dp_rank: int = 0, tier: Tier = Tier.DEVICE) -> int:
        """How many block names a pool holds in one tier.

        Raises:
            NotFound: the pool is unknown.
        """
        (pool,) = self._pools_of(worker, dp_rank)
        return len(self._tree.maps[1 << self._shifts[pool] + TIERS.index(tier)])

    def _pools_of(self, worker: Worker, dp_rank: int | None) -> list[Pool]:
        if dp_rank is not None:
            pools = [(worker, dp_rank)] if (worker, dp_rank) in self._shifts else []
        else:
            pools = [pool for pool in self._shifts if pool[0] == worker]
        if not pools:
            rank = "" if dp_rank is None else f", rank {dp_rank}"
            raise NotFound(f"the index knows no worker {worker!r}{rank}")
        return pools

    def _store(self, pool: Pool, bit: int, data: Stored) -> None:
        names, blocks = _checked(data)
        run, at = self._tree.root, 0
        if data.parent is not None:
            found = self._find_name(pool, bit, data.parent)
            if found is None:
                raise _unknown_parent(pool, data.parent)
            run, at = found
        if not names:
            return
        if self._tree.maps[bit].keys().isdisjoint(names):
            self._tree.place(bit, run, at, names, blocks)
        else:
            self._tree.place_again(bit, run, at, names, blocks)

    def _find_name(self, pool: Pool, bit: int, name: int) -> tuple[Run, int] | None:
        """Where a name of the pool is, and how many blocks of its run it ends; its own tier before the others."""
        maps = self._tree.maps
        if name not in maps[bit]:
            bit = next((other for other in _bits(self._shifts[pool]) if name in maps[other]), 0)
            if not bit:
                return None
        return self._tree.position(bit, name)

    def _clear(self, pool: Pool) -> None:
        for bit in _bits(self._shifts[pool]):
            self._tree.clear(bit)

    def _told(self, pool: Pool) -> Iterator[Event]:
        tiers = dict(zip(_bits(self._shifts[pool]), TIERS, strict=True))
        for event_id, (bit, data) in enumerate(self._told_of(list(tiers))):
            yield Event(event_id, data, tiers[bit], pool[1])

    def _told_of(self, bits: Sequence[int]) -> Iterator[tuple[int, Stored | Removed]]:
        """What to say of the blocks of a pool, and of which tier."""
        maps = [self._tree.maps[bit] for bit in bits]
        leading = self._runs_that_lead(sum(bits))
        parents: dict[Run, int | None] = {self._tree.root: None}
        lent: list[int] = []
        spare = (name for name in count(1) if all(name not in held_by for held_by in maps))
        for run in self._tree.walk(self._tree.root):
            if run not in leading or run.parent is None:
                continue
            parent = parents[run.parent]
            size = len(run.blocks)
            for bit in bits:
                known = run.names.get(bit, ())
                for layer in range(0, len(known), size):
                    yield bit, Stored(known[layer : layer + size], parent, run.blocks)
            if leading.isdisjoint(run.children.values()):
                continue
            last = self._last_name(run, bits)
            if last is None:
                names = [next(spare) for _ in range(size)]
                lent += names
                last = names[-1]
                yield bits[0], Stored(names, parent, run.blocks)
            parents[run] = last
        if lent:
            yield bits[0], Removed(lent)

    def _last_name(self, run: Run, bits: Sequence[int]) -> int | None:
        """A name that means the last block of a run in all tiers of a pool that know it."""
        size = len(run.blocks)
        ends = {bit: run.names.get(bit, ())[size - 1 :: size] for bit in bits}
        for name in (name for of_tier in ends.values() for name in of_tier):
            if all(name in ends[bit] or name not in self._tree.maps[bit] for bit in bits):
                return name
        return None

    def _runs_that_lead(self, pool_bits: int) -> set[Run]:
        """The runs that the pool holds in any tier, and those on the way to them."""
        leading: set[Run] = set()
        for run in self._tree.walk(self._tree.root):
            if run.held & pool_bits:
                above: Run | None = run
                while above is not None and above not in leading:
                    leading.add(above)
                    above = above.parent
        return leading

    def _overlaps(self, steps: list[tuple[int, int]], depth: int) -> dict[Pool, Overlap]:
        """Turn who holds what from which depth on into each pool's reach in each tier."""
        devices = self._devices
        first = steps[0][0]
        if len(steps) == 1 and not first & ~devices:  # the same pools all the way, nothing below the device
            return dict.fromkeys(self._named(first), Overlap(depth, depth, depth, depth))
        reach = [held & devices for held, _ in steps]
        by_tier = [self._by_pool(reach, steps, depth)]
        for tier in range(1, len(TIERS)):
            lower = [held >> tier & devices for held, _ in steps]
            if any(lower):
                reach = [above | below for above, below in zip(reach, lower, strict=True)]
                by_tier.append(self._by_pool(reach, steps, depth))
            else:
                by_tier.append(by_tier[-1])
        device, host, disk, external = by_tier
        if device is external:
            return {pool: Overlap(upto, upto, upto, upto) for pool, upto in device.items()}
        return {
            pool: Overlap(device.get(pool, 0), host.get(pool, 0), disk.get(pool, 0), upto)
            for pool, upto in external.items()
        }

    def _by_pool(self, reach: list[int], steps: list[tuple[int, int]], depth: int) -> dict[Pool, int]:
        """The depth to which each pool holds all blocks, if it holds the first."""
        result: dict[Pool, int] = {}
        alive = reach[0]
        for held, (_, start) in zip(reach, steps, strict=True):
            if left := alive & ~held:
                result |= dict.fromkeys(self._named(left), start)
                alive ^= left
        return result | dict.fromkeys(self._named(alive), depth)

    def _named(self, mask: int) -> tuple[Pool, ...]:
        """The pools whose lowest bits make up ``mask``."""
        members = self._members.get(mask)
        if members is None:
            if len(self._members) >= _REMEMBERED:
                self._members.clear()
            members = tuple(pool for shift, pool in self._pools.items() if mask >> shift & 1)
            self._members[mask] = members
        return members


def _bits(shift: int) -> tuple[int, ...]:
    return tuple(1 << shift + tier for tier in range(len(TIERS)))


def _checked(data: Stored) -> tuple[tuple[int, ...], tuple[int, ...]]:
    names, blocks = tuple(data.hashes), tuple(data.local_hashes)
    if len(blocks) != len(names):
        raise InvalidInput(f"{len(names)} blocks need as many local hashes; got {len(blocks)}")
    if len(names) > 1 and len(set(names)) != len(names):
        raise InvalidInput("a run names one block twice")
    return names, blocks


def _unknown_parent(pool: Pool, parent: int) -> NotFound:
    return NotFound(f"worker {pool[0]!r}, rank {pool[1]} stored blocks after block {parent}, which it has not told of")
