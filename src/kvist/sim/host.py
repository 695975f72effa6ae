"""Host memory beside one engine, as the native offloading of Dynamo 1.6.1's mocker keeps it.

Prompt blocks are written through: what a pass computes and the host lacks is copied after that pass. What the device
lacks and the host has is loaded before a request is admitted; the request stands aside meanwhile. Either direction is
a lane that moves one transfer after the other. A slot whose block is still being copied may be taken, but the pass
that writes to it waits. It knows contents, slots and times in nanoseconds, and no passes. Rules: aisimulate-core
0.13, which follows vLLM's ``OffloadingConnector``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from heapq import heappop, heappush

import numpy as np
from xxhash import xxh3_64_intdigest

from kvist.hashing.dynamo import SEED
from kvist.sim.chains import chains
from kvist.sim.config import HostOffload
from kvist.sim.pool import Contents, SlotPool, Slots
from kvist.sim.trace import Trace


class Kind(Enum):
    """Which way a transfer goes; of those that end at once, stores come first."""

    STORE = 0
    LOAD = 1


@dataclass(slots=True)
class _Transfer:
    """Blocks that move together.

    Attributes:
        kind: which way.
        request: for whom, or of whom.
        contents: the blocks.
        slots: on the device that it reads; none of a load.
        end: when it ends; ``None``: it begins when the pass under way ends.
    """

    kind: Kind
    request: int
    contents: list[int]
    slots: list[int]
    end: int | None = None


@dataclass(slots=True)
class Loaded:
    """Slots that a request holds before it is admitted.

    Attributes:
        slots: of the blocks that were on the device, and of those that come.
        found: how many of the first kind.
        contents: of the second.
        chain: of both.
        tail: blocks that it needs beyond these.
        has_come: whether they are there.
        is_wanted: whether the request still is.
    """

    slots: Slots
    found: int
    contents: list[int]
    chain: Contents
    tail: int
    has_come: bool = False
    is_wanted: bool = True


class Lookup(Enum):
    """What the host says of a request's blocks that the device lacks."""

    MISS = auto()
    HIT = auto()
    LATER = auto()
    """They are on their way, up or down: ask again when a transfer has ended."""


class SourcePool(SlotPool):
    """A pool of which slots may still be read after they were given back.

    Attributes:
        readers: by slot, the end of the transfer that reads it.
        fence: when all slots that were taken so far may be written.
    """

    def __init__(self, num_slots: int, num_contents: int, *, tell: bool = False) -> None:
        super().__init__(num_slots, num_contents, tell=tell)
        self.readers: dict[int, int] = {}
        self.fence = 0

    def _take(self, n: int) -> Slots:
        slots = super()._take(n)
        if self.readers:
            self.fence = max(self.fence, self.read_until(slots.tolist()))
        return slots

    def read_until(self, slots: Iterable[int]) -> int:
        """When the last of these slots is read, 0: nobody reads them."""
        return max((self.readers.get(slot, 0) for slot in slots), default=0)


class HostMemory:
    """The blocks in host memory, and what moves.

    Args:
        config: how large and how fast.
        block_bytes: of one block.
        pool: of the device.
        order: of contents that came at once, when they must go; none: as they lie in the prompt.
    """

    def __init__(
        self, config: HostOffload, block_bytes: int, pool: SourcePool, order: Sequence[int] | None = None
    ) -> None:
        self._config = config
        self._pool = pool
        self._order = order
        self._latency = config.latency_ms * 1e6
        self._block_ns = {Kind.STORE: block_bytes / config.store_gbps, Kind.LOAD: block_bytes / config.load_gbps}
        self._tails = {Kind.STORE: 0.0, Kind.LOAD: 0.0}
        self._transfers: dict[int, _Transfer] = {}
        self._due: list[tuple[int, int, int]] = []  # end, kind, number
        self._prepared: list[int] = []
        self._number = 0
        self._pending: set[int] = set()  # contents that a store brings
        self._pins: dict[int, int] = {}  # contents that loads read
        self._idle: dict[int, None] = {}  # the other contents, least recently used first
        self._stored: dict[int, int] = {}  # prompt blocks of each request that are no longer looked at
        self._latest: dict[int, int] = {}  # the last store of each request
        self.loads: dict[int, Loaded] = {}
        self.queue: list[int] = []  # requests that stand aside, in order
        self._asleep: set[int] = set()  # those of them that wait for the end of a transfer

    @property
    def is_moving(self) -> bool:
        """Whether a transfer is under way or prepared."""
        return bool(self._transfers)

    @property
    def tails(self) -> int:
        """Blocks that requests with loads need beyond those they hold."""
        return sum(load.tail for load in self.loads.values())

    def deadline(self) -> int | None:
        """When the next transfer ends."""
        return self._due[0][0] if self._due else None

    def advance(self, now: int) -> None:
        """End the transfers that are due."""
        while self._due and self._due[0][0] <= now:
            _, _, number = heappop(self._due)
            transfer = self._transfers.pop(number)
            self._asleep.clear()
            if transfer.kind is Kind.STORE:
                self._pending.difference_update(transfer.contents)
                self._touch(transfer.contents)
                for slot in transfer.slots:
                    if self._pool.readers.get(slot) == transfer.end:
                        del self._pool.readers[slot]
            else:
                self._unpin(transfer.contents)
                load = self.loads[transfer.request]
                load.slots[load.found :] = self._pool.cache(load.slots[load.found :], load.chain)
                load.has_come = True
                if not load.is_wanted:
                    self.forget(transfer.request)

    def end_pass(self, now: int) -> None:
        """Begin the copies of what the pass that ends now has computed."""
        self.advance(now)
        for number in self._prepared:
            end = self._submit(number, now)
            for slot in self._transfers[number].slots:
                self._pool.readers[slot] = end
        self._prepared.clear()
        self.advance(now)

    # Loads.

    def ready(self) -> list[int]:
        """Requests that stand aside and may be asked for again, in order."""
        return [request for request in self.queue if request not in self._asleep]

    def lookup(self, request: int, prompt: list[int], found: int) -> tuple[Lookup, list[int]]:
        """What of the prompt's blocks after the ``found`` first ones can be loaded."""
        if request in self.loads:
            return Lookup.LATER, []
        if self._latest.get(request) in self._transfers:
            return Lookup.LATER, []
        wanted: list[int] = []
        answer = Lookup.HIT
        for content in prompt[found:]:
            if content in self._pending:
                answer = Lookup.LATER
            elif content not in self._idle:
                if content not in self._pins:
                    break
                answer = Lookup.LATER
            wanted.append(content)
        self._touch_each(prompt)
        return (answer, wanted) if wanted else (Lookup.MISS, [])

    def put_aside(self, request: int) -> None:
        """A request waits for the end of a transfer."""
        if request not in self.queue:
            self.queue.append(request)
        self._asleep.add(request)

    def load(self, request: int, load: Loaded, now: int) -> None:
        """Bring contents into slots that the request holds."""
        for content in load.contents:
            self._idle.pop(content, None)
            self._pins[content] = self._pins.get(content, 0) + 1
        self.loads[request] = load
        number = self._start(_Transfer(Kind.LOAD, request, load.contents, []))
        self._submit(number, max(now, self._pool.read_until(load.slots[load.found :].tolist())))

    def admit(self, request: int, cached: int) -> None:
        """A request runs, with so many blocks that it had not to compute."""
        if self.loads.pop(request, None) is not None:
            self._stored[request] = cached
        if request in self.queue:
            self.queue.remove(request)
            self._asleep.discard(request)

    def forget(self, request: int) -> None:
        """A request is gone; what is on its way comes all the same."""
        load = self.loads.get(request)
        if load is not None and load.has_come:
            self._pool.release(load.slots[::-1])
            del self.loads[request]
        elif load is not None:
            load.is_wanted = False
        if request in self.queue:
            self.queue.remove(request)
            self._asleep.discard(request)

    # Stores.

    def has_unstored(self, request: int, blocks: int) -> bool:
        """Whether some of the first blocks have not been looked at."""
        return self._stored.get(request, 0) < blocks

    def store(self, request: int, prompt: list[int], slots: Slots, computed: int) -> None:
        """Prepare the copy of what the host lacks of the first ``computed`` blocks.

        Nothing is done, and it may be tried again, while the host has no room or a slot is read for another block.
        """
        start = self._stored.get(request, 0)
        wanted = prompt[start:computed]
        missing = [start + i for i, content in enumerate(wanted) if not self._has(content)]
        if missing:
            sources: list[int] = slots[missing].tolist()
            if self._pool.read_until(sources):
                return
            held = len(self._idle) + len(self._pins) + len(self._pending)
            excess = len(missing) - (self._config.num_blocks - held)
            kept = set(wanted)
            victims: list[int] = []
            for content in self._idle if excess > 0 else ():
                if content not in kept:
                    victims.append(content)
                    if len(victims) == excess:
                        break
            if len(victims) < excess:
                return
            for content in victims:
                del self._idle[content]
            contents = [prompt[i] for i in missing]
            self._pending.update(contents)
            number = self._start(_Transfer(Kind.STORE, request, contents, sources))
            self._prepared.append(number)
            self._latest[request] = number
            self._touch_each(prompt)
        self._stored[request] = computed

    def give_way(self, request: int) -> None:
        """A running request loses its slots: what is being copied from them must be read first."""
        transfer = self._transfers.get(self._latest.get(request, -1))
        if transfer is not None and transfer.end is not None:
            self._pool.fence = max(self._pool.fence, transfer.end)

    # Transfers.

    def _start(self, transfer: _Transfer) -> int:
        self._number += 1
        self._transfers[self._number] = transfer
        return self._number

    def _submit(self, number: int, not_before: int) -> int:
        transfer = self._transfers[number]
        begin = max(self._tails[transfer.kind], not_before + self._latency)
        self._tails[transfer.kind] = begin + self._block_ns[transfer.kind] * len(transfer.contents)
        transfer.end = round(self._tails[transfer.kind])
        heappush(self._due, (transfer.end, transfer.kind.value, number))
        return transfer.end

    def _has(self, content: int) -> bool:
        return content in self._idle or content in self._pins or content in self._pending

    def _touch(self, contents: list[int]) -> None:
        """At once: then a fixed order says which of them goes first."""
        for content in contents if self._order is None else sorted(contents, key=self._order.__getitem__):
            if content not in self._pins:
                self._idle.pop(content, None)
                self._idle[content] = None

    def _touch_each(self, prompt: list[int]) -> None:
        """From the end, so that a chain loses its tail before its head."""
        for content in reversed(prompt):
            if content in self._idle:
                del self._idle[content]
                self._idle[content] = None

    def _unpin(self, contents: list[int]) -> None:
        for content in contents:
            self._pins[content] -= 1
            if not self._pins[content]:
                del self._pins[content]
        self._touch(contents)


def eviction_order(trace: Trace, block_size: int) -> list[int]:
    """Dynamo's order of blocks that came at once, by content: their sequence hashes, of the tokens that it makes up.

    The tokens of a trace block are its id, repeated; ids are numbered in the order in which the file has them.
    """
    _, first, inverse = np.unique(trace.block_ids, return_index=True, return_inverse=True)
    numbers = np.argsort(np.argsort(first))[inverse].astype("<u4")
    found = chains(trace, block_size)
    hashes = [-1] * found.count
    locals_: dict[bytes, int] = {}
    for row in range(len(trace)):
        parent = -1
        tokens = numbers[trace.offsets[row] : trace.offsets[row + 1]]
        for place, content in enumerate(found.of(row).tolist()):
            if hashes[content] < 0:
                at = np.arange(place * block_size, (place + 1) * block_size) // trace.block_size
                block = tokens[at].tobytes()
                if (local := locals_.get(block)) is None:
                    local = locals_[block] = xxh3_64_intdigest(block, SEED)
                both = parent.to_bytes(8, "little") + local.to_bytes(8, "little") if place else b""
                hashes[content] = xxh3_64_intdigest(both, SEED) if place else local
            parent = hashes[content]
    return hashes
