"""`LowerPool`: the blocks that lie in one tier below the device, and which of them goes when it is full.

Knows presence, readers and order; must not know links or time, nor how a block gets in or out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, suppress
from itertools import groupby

from kvist.blocks.events import EventLog, Removed, Tier
from kvist.blocks.policy import make_policy
from kvist.blocks.resident import Resident
from kvist.errors import InvalidInput, NotFound, PoolExhausted

Gone = tuple[EventLog, Resident]
"""A block that went, and the log that is to hear of it."""


class LowerPool:
    """A bounded set of blocks, named by their lineage hashes. It may be one worker's, or shared by many.

    A block is *arriving* from `reserve` to `commit`: it has its place, and nobody can find it. Then it is *resident*,
    until it is evicted, which happens only to make room, and only to blocks that nobody reads.

    Whoever brings a block names the log that hears of its coming and of its going. So the index of a worker's events
    has what that worker brought. Events come from the caller, and from `tell_gone` and `clear`.

    Args:
        tier: where it is, in events.
        capacity: blocks that it holds, arriving ones too.
        policy: a name of `kvist.blocks.policy.POLICIES`.

    Raises:
        InvalidInput: a capacity below 1, or an unknown policy.
    """

    def __init__(self, tier: Tier, capacity: int, policy: str = "lineage") -> None:
        self.tier = tier
        self.capacity = capacity
        self._parents: dict[int, int | None] = {}  # of all that are held
        self._children: dict[int | None, int] = {}  # how many of them come after each block, held or not
        self._policy = make_policy(policy, capacity=capacity, parents=self._parents)
        self._resident: dict[int, Resident] = {}
        self._arriving: dict[int, Resident] = {}
        self._logs: dict[int, EventLog] = {}  # of all that are held
        self._readers: dict[int, int] = {}  # of residents that are read, by how many

    def __len__(self) -> int:
        """How many blocks are resident."""
        return len(self._resident)

    def __contains__(self, key: int) -> bool:
        """Whether this block is resident."""
        return key in self._resident

    def __iter__(self) -> Iterator[Resident]:
        """The residents, in no order."""
        return iter(self._resident.values())

    def holds(self, key: int) -> bool:
        """Whether this block is resident or arriving."""
        return key in self._parents

    def get(self, key: int) -> Resident | None:
        """This block if it is resident."""
        return self._resident.get(key)

    def readers(self, key: int) -> int:
        """How many read this block."""
        return self._readers.get(key, 0)

    def told_by(self, key: int) -> EventLog | None:
        """The log that hears of this block; ``None`` if it is not held."""
        return self._logs.get(key)

    def reserve(self, blocks: Sequence[Resident], log: EventLog) -> tuple[int, list[Gone]]:
        """Make room for blocks that will arrive: as many as fit besides those that are read or arriving, or that they
        hang on, up to one that would come after itself: what is here may be older than what the device says now. What
        goes for them is for the caller to tell, before any other event: see `tell_gone`.

        Args:
            blocks: none of them held, parents before their children.
            log: hears when they go.

        Returns:
            How many of ``blocks``, from the first, are arriving now, and which blocks went, in this order.

        Raises:
            InvalidInput: one of them is held, or given twice.
        """
        keys = [block.lineage_hash for block in blocks]
        if len(set(keys)) != len(keys) or not self._parents.keys().isdisjoint(keys):
            raise InvalidInput(f"a block to bring into the {self.tier} tier is there already, or given twice")
        fit = min(len(blocks), self.capacity - len(self._arriving) - len(self._readers))
        room = self.capacity - len(self._parents)
        victims = self._evict(fit - room, {block.lineage_parent for block in blocks}) if fit > room else []
        fit = min(fit, room + len(victims))
        for place, block in enumerate(blocks[:fit]):
            key, parent = block.lineage_hash, block.lineage_parent
            if self._follows(parent, key):
                fit = place
                break
            self._parents[key] = parent
            self._children[parent] = self._children.get(parent, 0) + 1
            self._arriving[key] = block
            self._logs[key] = log
        self._policy.insert(keys[:fit], pinned=True)
        return fit, victims

    def tell_gone(self, gone: Sequence[Gone]) -> None:
        """Tell those who brought these blocks that they went. Each hears of it even if the sink of another fails."""
        with ExitStack() as telling:
            runs = [list(run) for _, run in groupby(gone, key=lambda one: id(one[0]))]
            for run in reversed(runs):
                removed = Removed([block.sequence_hash for _, block in run])
                telling.callback(run[0][0].emit, removed, tier=self.tier)

    def commit(self, keys: Sequence[int]) -> None:
        """These blocks have arrived. The caller tells their logs.

        Raises:
            NotFound: one of them is not arriving, or given twice.
        """
        for key, block in self._take_arriving(keys).items():
            self._resident[key] = block
        self._policy.unpin(keys)

    def cancel(self, keys: Sequence[int]) -> None:
        """These blocks will not arrive after all.

        Raises:
            NotFound: as `commit`.
        """
        for key in self._take_arriving(keys):
            self._policy.remove((key,))
            self._forget(key)
            del self._logs[key]

    def pin(self, keys: Sequence[int]) -> None:
        """These blocks get one more reader each. Equal to a use of them.

        Raises:
            NotFound: one of them is not resident, or given twice.
        """
        self._require(keys)
        if len(set(keys)) != len(keys):
            raise NotFound(f"a block of the {self.tier} tier is to get a reader twice in one call")
        self._policy.pin([key for key in keys if key not in self._readers])
        for key in keys:
            self._readers[key] = self._readers.get(key, 0) + 1

    def unpin(self, keys: Sequence[int]) -> None:
        """These blocks lose one reader each. Whoever has none may go again.

        Raises:
            NotFound: one of them is not read, or given twice.
        """
        if len(set(keys)) != len(keys) or not self._readers.keys() >= set(keys):
            raise NotFound(f"a block of the {self.tier} tier is to lose a reader, and has none, or is given twice")
        for key in keys:
            self._readers[key] -= 1
        unread = [key for key in keys if not self._readers[key]]
        for key in unread:
            del self._readers[key]
        self._policy.unpin(unread)

    def touch(self, keys: Sequence[int]) -> None:
        """Note one use of these blocks.

        Raises:
            NotFound: one of them is not resident.
        """
        self._require(keys)
        self._policy.touch(keys)

    def clear(self, log: EventLog) -> None:
        """Let all residents go that ``log`` hears of, and tell it; those that are read stay."""
        gone = [key for key in self._resident if self._logs[key] is log and key not in self._readers]
        self._policy.remove(gone)
        self.tell_gone([self._drop(key) for key in gone])

    def check_integrity(self) -> None:
        """Check that the pool's figures agree with each other.

        Raises:
            AssertionError: they do not: a bug of ours.
        """
        held = self._parents.keys()
        assert len(held) <= self.capacity, f"{self.tier}: {len(held)} of {self.capacity}"
        assert self._resident.keys() | self._arriving.keys() == held == self._logs.keys()
        assert self._resident.keys().isdisjoint(self._arriving)
        assert self._children == Counter(self._parents.values())
        assert self._readers.keys() <= self._resident.keys()
        assert all(count > 0 for count in self._readers.values())
        assert len(self._policy) == len(held) and all(key in self._policy for key in held)
        assert set(self._policy) == held - self._arriving.keys() - self._readers.keys()

    def _evict(self, count: int, above: Set[int | None]) -> list[Gone]:
        """Let ``count`` blocks go, none of them in ``above``; fewer if there are not as many."""
        protected = self._resident.keys() & above
        try:
            keys = self._policy.evict(count, protected)
        except PoolExhausted:  # how many may go besides those that are protected is for the policy to say
            keys = []
            with suppress(PoolExhausted):
                while True:
                    keys += self._policy.evict(1, protected)
        return [self._drop(key) for key in keys]

    def _follows(self, key: int | None, above: int) -> bool:
        """Whether this block is, or comes after, another, which is not held."""
        if above not in self._children:
            return key == above
        while key is not None and key != above:
            key = self._parents.get(key)
        return key == above

    def _forget(self, key: int) -> None:
        parent = self._parents.pop(key)
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]

    def _drop(self, key: int) -> Gone:
        self._forget(key)
        return self._logs.pop(key), self._resident.pop(key)

    def _take_arriving(self, keys: Sequence[int]) -> dict[int, Resident]:
        if len(set(keys)) != len(keys) or not self._arriving.keys() >= set(keys):
            raise NotFound(f"a block is not on its way into the {self.tier} tier, or given twice")
        return {key: self._arriving.pop(key) for key in keys}

    def _require(self, keys: Sequence[int]) -> None:
        if not self._resident.keys() >= set(keys):
            raise NotFound(f"a block is not in the {self.tier} tier")
