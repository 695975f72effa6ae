"""A random workload of workers with tiers, for those who follow their events."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID

import pytest

from kvist.blocks import BlockManager, Deref, Event, FullBlock, PartialBlock, Promote, Tier, UniqueBlock, Use
from kvist.blocks.events import Stored
from kvist.blocks.resident import Resident
from kvist.hashing import local_block_hashes, sequence_hashes
from kvist.tiers import LoadState, TierConfig, Tiers, TiersConfig

BLOCK_SIZE = 4
RUNS = [(0, 6000), *(pytest.param(seed, 30_000, marks=pytest.mark.slow) for seed in (1, 2, 3))]
"""Seeds, and how many moves."""
Place = tuple[int, int, Tier]
"""(worker, rank, tier)."""
Held = dict[int, tuple[int | None, int]]
"""Of each block the names of the block before it and of its tokens."""


@dataclass
class Request:
    """A running request."""

    tokens: list[int]
    blocks: list[UniqueBlock]


class Worker:
    """One pool with tiers below it, that serves random requests."""

    def __init__(self, worker: int, rank: int, mode: str, publish: Callable[[Sequence[Event]], object]) -> None:
        self.worker, self.rank = worker, rank
        self.moves = 0
        self.loads = 0
        self.clears = 0
        self.events: list[Event] = []
        self.publish = publish
        self.manager = BlockManager(96, BLOCK_SIZE, events=self.events.append, dp_rank=rank)
        self.tiers: Tiers | None = None
        if mode != "none":
            below = {
                name: TierConfig(capacity=capacity, down_gb_per_s=0.5, up_gb_per_s=1.0)
                for name, capacity in (("host", 160), ("disk", 240), ("external", 300))
            }
            config = TiersConfig(block_bytes=100_000, mode=mode, batch_blocks=8, transfers=2, **below)
            self.tiers = Tiers(self.manager, config)
        self.running: list[Request] = []
        self.served: list[list[int]] = []
        self.random = random.Random(f"{worker}/{rank}/{mode}")

    def step(self, now: float, prompts: Callable[[], list[int]]) -> None:
        """Something happens; what it told is published."""
        if self.tiers is not None:
            self.tiers.advance(now)
        numbers = self.random
        if len(self.running) < 4 and numbers.random() < 0.3:
            self.admit(prompts())
        elif self.running:
            sequence = numbers.choice(self.running)
            if numbers.random() < 0.15 or not self.decode(sequence):
                self.end(sequence)
        self.flush()

    def admit(self, tokens: list[int]) -> None:
        local_hashes = local_block_hashes(tokens, BLOCK_SIZE)
        hashes = sequence_hashes(local_hashes)
        if self.tiers is not None and self.random.random() < 0.7:
            self.loads += self.tiers.load(hashes).state is LoadState.RUNNING
        full = len(hashes) * BLOCK_SIZE
        blocks: list[UniqueBlock] = [FullBlock(name) for name in hashes]
        if len(tokens) > full:
            blocks.append(PartialBlock(UUID(int=self.random.getrandbits(128))))
        split = [tokens[start : start + BLOCK_SIZE] for start in range(0, full, BLOCK_SIZE)]
        handled = self.process(Use(blocks, local_hashes, token_ids=split))
        sequence = Request(tokens, blocks[:handled])
        if handled < len(blocks):
            self.end(sequence)
        else:
            self.running.append(sequence)

    def decode(self, sequence: Request) -> bool:
        """Some tokens more. Whether there was room for them."""
        for _ in range(self.random.randrange(1, 2 * BLOCK_SIZE)):
            if len(sequence.tokens) % BLOCK_SIZE == 0:
                parent = sequence.blocks[-1]
                partial = PartialBlock(UUID(int=self.random.getrandbits(128)))
                assert isinstance(parent, FullBlock)
                if not self.process(Use([partial], parent=parent)):
                    return False
                sequence.blocks.append(partial)
            sequence.tokens.append(self.random.randrange(8))
            if len(sequence.tokens) % BLOCK_SIZE == 0:
                self.promote(sequence)
        return True

    def promote(self, sequence: Request) -> None:
        local_hashes = local_block_hashes(sequence.tokens, BLOCK_SIZE)
        hashes = sequence_hashes(local_hashes)
        partial = sequence.blocks[-1]
        assert isinstance(partial, PartialBlock)
        parent = hashes[-2] if len(hashes) > 1 else None
        own = sequence.tokens[-BLOCK_SIZE:]
        self.process(Promote(partial.uuid, hashes[-1], parent, local_hashes[-1], token_ids=own))
        sequence.blocks[-1] = FullBlock(hashes[-1])

    def end(self, sequence: Request) -> None:
        self.served.append(sequence.tokens)
        self.process(Deref(sequence.blocks[::-1]))
        if sequence in self.running:
            self.running.remove(sequence)

    def rest(self, now: float) -> float:
        """End all requests, and wait until nothing is under way. The time then."""
        while self.running:
            self.end(self.running[0])
        while self.tiers is not None and (due := self.tiers.deadline()) is not None:
            now = max(now, due)
            self.tiers.advance(now)
        self.flush()
        return now

    def clear(self, now: float) -> float:
        now = self.rest(now)
        (self.tiers or self.manager).clear()
        self.clears += 1
        self.flush()
        return now

    def flush(self) -> None:
        if self.events:
            self.publish([*self.events])
            self.events.clear()

    def process(self, move: Use | Deref | Promote) -> int:
        self.moves += 1
        return self.manager.process(move)

    @property
    def held(self) -> dict[Place, Held]:
        """All blocks that lie here, as the pools themselves know them."""
        pools: dict[Tier, Iterable[Resident]] = dict.fromkeys(Tier, ())
        if self.tiers is not None:
            pools |= {level.pool.tier: level.pool for level in self.tiers.levels}
        pools[Tier.DEVICE] = self.manager.residents()
        return {
            (self.worker, self.rank, tier): {
                block.sequence_hash: (block.parent, block.local_hash) for block in pools[tier]
            }
            for tier in Tier
        }


class Workload:
    """Several workers, and prompts that share their beginnings. Equal seeds give equal workloads.

    Args:
        pools: of each worker its id, rank, and how its blocks go down (``"none"``: they do not).
        publish: gets what a worker told in one step.
        seed: of all that is random.

    Attributes:
        now: milliseconds.
        counts: of each tier how many blocks were stored there, and removed.
    """

    def __init__(
        self,
        pools: Sequence[tuple[int, int, str]],
        publish: Callable[[Worker, Sequence[Event]], object],
        seed: int = 0,
    ) -> None:
        self._random = random.Random(seed)
        self._publish = publish
        self.now = 0.0
        self._prompts: list[list[int]] = []
        self.counts = {(tier, kind): 0 for tier in Tier for kind in ("stored", "removed")}
        self._documents = [self._text(4 * self._random.randrange(4, 24)) for _ in range(16)]
        self.workers = [
            Worker(worker, rank, mode, functools.partial(self._tell, which))
            for which, (worker, rank, mode) in enumerate(pools)
        ]

    @property
    def texts(self) -> list[list[int]]:
        """The tokens of all requests that have ended, prompt and answer."""
        return [tokens for worker in self.workers for tokens in worker.served]

    @property
    def moves(self) -> int:
        return sum(worker.moves for worker in self.workers)

    def run(self, moves: int) -> None:
        """Go on until so many moves were made in all."""
        while self.moves < moves:
            self.now += self._random.expovariate(1.0)
            self._random.choice(self.workers).step(self.now, self._prompt)

    def clear(self, which: int) -> None:
        self.now = self.workers[which].clear(self.now)

    def rest(self) -> None:
        for worker in self.workers:
            self.now = worker.rest(self.now)
            worker.manager.check_integrity()
            if worker.tiers is not None:
                worker.tiers.check_integrity()

    @property
    def held(self) -> dict[Place, Held]:
        return {place: blocks for worker in self.workers for place, blocks in worker.held.items()}

    def _text(self, length: int) -> list[int]:
        return [self._random.randrange(1000) for _ in range(length)]

    def _prompt(self) -> list[int]:
        numbers = self._random
        if self._prompts and numbers.random() < 0.3:
            prompt = [*numbers.choice(self._prompts)]
        else:
            document = numbers.choice(self._documents)
            prompt = document[: numbers.randrange(1, len(document))] + self._text(numbers.randrange(1, 24))
        self._prompts.append([*prompt])
        return prompt

    def _tell(self, which: int, events: Sequence[Event]) -> None:
        for event in events:
            kind = "stored" if isinstance(event.data, Stored) else "removed"
            self.counts[event.tier, kind] += len(getattr(event.data, "hashes", ()))
        self._publish(self.workers[which], events)


def held_of(event: Event) -> Held:
    """The blocks of a Stored."""
    data = event.data
    assert isinstance(data, Stored)
    names = [data.parent, *data.hashes]
    return dict(zip(data.hashes, zip(names[:-1], data.local_hashes, strict=True), strict=True))
