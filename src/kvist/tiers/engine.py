"""`Tiers`: what lies below one worker's device, and all traffic to and from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from msgspec.structs import replace

from kvist.blocks import BlockManager, Tier
from kvist.blocks.moves import LineageEntry
from kvist.blocks.requests import require_hashes
from kvist.errors import Conflict, InvalidInput
from kvist.tiers.config import TiersConfig
from kvist.tiers.level import Level, TierStats
from kvist.tiers.links import Network
from kvist.tiers.load import Load, Loader
from kvist.tiers.offload import Offload


class Tiers:
    """The tiers below one worker's device: host, and then disk and external if there are such.

    Blocks go down by themselves, as the manager releases and evicts them; `load` brings them up. All that takes time
    happens in `advance`, which is to be called with the time before each step of the worker, and at `deadline` when it
    can do nothing else. Events of all tiers go to the manager's log.

    A block here is its lineage hash: the same hash is the same block, with the same blocks before it.

    Args:
        manager: of the device. It gets attached.
        config: see `TiersConfig`.
        network: the clock; by default one for this worker alone.
        shared: levels that other workers use, too, instead of those that ``config`` describes. Their links must be of
            ``network``, their workers' blocks equally large.

    Raises:
        Conflict: the manager has somebody attached.
        InvalidInput: a shared level is no tier of ``config``, or belongs to another network.

    Attributes:
        config: as given.
        network: the clock.
        levels: from the top.
    """

    def __init__(
        self,
        manager: BlockManager,
        config: TiersConfig,
        *,
        network: Network | None = None,
        shared: Mapping[Tier, Level] | None = None,
    ) -> None:
        self.config = config
        self.network = network or Network()
        self.levels = _levels(config, self.network, shared or {})
        self._manager = manager
        self._stats = [TierStats() for _ in self.levels]
        self._offload = Offload(manager, self.levels, config, self._stats)
        self._loader = Loader(manager, self.levels, config, self._stats, self.network)
        manager.attach(self._offload)

    @property
    def stats(self) -> dict[Tier, TierStats]:
        """What this worker did in each tier so far: a copy."""
        return {level.pool.tier: replace(stats) for level, stats in zip(self.levels, self._stats, strict=True)}

    @property
    def is_idle(self) -> bool:
        """Whether none of this worker's blocks is on its way, or waits for it."""
        return self._offload.is_idle and self._loader.is_idle

    def peek(self, hashes: Sequence[int], *, lineage: Sequence[LineageEntry] = ()) -> int:
        """How many leading blocks of a chain are on the device or in a tier below it. Changes nothing.

        Args:
            hashes: sequence hashes, the root first.
            lineage: of each, as in `kvist.blocks.Use`.

        Raises:
            InvalidInput: as `load`.
        """
        keys = _keys(hashes, lineage)
        known = self._manager.peek(hashes)
        while known < len(keys) and any(keys[known] in level.pool for level in self.levels):
            known += 1
        return known

    def load(self, hashes: Sequence[int], *, lineage: Sequence[LineageEntry] = ()) -> Load:
        """Bring up the longest run of blocks that continues what the device holds of a chain.

        What it needs is taken at once, or nothing: a reference to each block of the chain that the device holds, a
        reader of each block that is to come, and a slot for each. When the last byte is there, the blocks are inactive
        ones of the device, and the references are given back. A block that is on its way for another load is not
        brought twice: the answer is that load.

        Args:
            hashes: sequence hashes, the root first.
            lineage: of each, as in `kvist.blocks.Use`.

        Returns:
            Running, or why nothing runs: see `LoadState`. After it, ask `peek` of the manager, and load again if the
            chain goes on below.

        Raises:
            InvalidInput: a hash cannot be one or is given twice, ``lineage`` has another length, or the chain does not
                begin at a root.
        """
        keys = _keys(hashes, lineage)
        above = [parent for _, parent in lineage] if lineage else [None, *keys[:-1]][: len(keys)]
        return self._loader.load(hashes, keys, above)

    def deadline(self) -> float | None:
        """When something next ends on the network, of any worker; ``None`` if nothing is under way. Milliseconds."""
        return self.network.deadline()

    def advance(self, now: float) -> None:
        """Let time pass on the network, for all its workers, and keep some slots of this worker's device free.

        Args:
            now: milliseconds.

        Raises:
            InvalidInput: as `kvist.tiers.links.Network.advance`.
            Exception: what a sink of events raised while blocks went down, now or before; they went all the same.
        """
        self.network.advance(now)
        with ExitStack() as last:
            last.callback(self._offload.raise_failure)
            self._offload.keep_free()

    def clear(self) -> None:
        """Forget all blocks of this worker, on the device and below; of shared levels those that it brought.

        Raises:
            Conflict: blocks are active, or on their way.
        """
        self._require_idle()
        if self._manager.num_active_blocks:
            raise Conflict(f"{self._manager.num_active_blocks} blocks of the device are active")
        with ExitStack() as clearing:  # all of it, whatever a sink of events does
            for level in reversed(self.levels):
                clearing.callback(level.pool.clear, self._manager.log)
            self._manager.clear()

    def close(self) -> None:
        """Let go of the manager.

        Raises:
            Conflict: blocks are on their way: from then on, nobody would keep the slots that they are read from.
            NotFound: that was done before.
        """
        self._require_idle()
        self._manager.detach()

    def check_integrity(self) -> None:
        """Check that what lies here, what is on its way, and what the device lends agree. O(blocks).

        Nobody else may have slots of the device.

        Raises:
            AssertionError: they do not: a bug of ours.
        """
        for level in self.levels:
            level.pool.check_integrity()
        self._offload.check_integrity()
        self._loader.check_integrity()
        assert self._loader.lent_slots.isdisjoint(self._offload.held_slots)
        manager = self._manager
        referred = sum(any(map(manager.refs, block.names)) for block in manager.residents())
        lent = manager.num_active_blocks - manager.num_partial_blocks - referred
        ours = len(self._loader.lent_slots) + len(self._offload.held_slots)
        assert lent == ours, f"the device lends {lent} slots, and {ours} are in use here"

    def _require_idle(self) -> None:
        if not self.is_idle:
            raise Conflict("blocks are on their way between tiers; wait until they have arrived")


def _levels(config: TiersConfig, network: Network, shared: Mapping[Tier, Level]) -> list[Level]:
    described = {Tier.HOST: config.host, Tier.DISK: config.disk, Tier.EXTERNAL: config.external}
    for tier, level in shared.items():
        if described.get(tier) is None:
            raise InvalidInput(f"the {tier} tier is shared, and the config has none")
        if level.pool.tier is not tier or level.down.network is not network or level.up.network is not network:
            raise InvalidInput(f"the shared {tier} level is of the {level.pool.tier} tier, or of another network")
    return [
        shared[tier] if tier in shared else Level.make(network, tier, each)
        for tier, each in described.items()
        if each is not None
    ]


def _keys(hashes: Sequence[int], lineage: Sequence[LineageEntry]) -> Sequence[int]:
    if lineage and len(lineage) != len(hashes):
        raise InvalidInput(f"lineage must name {len(hashes)} blocks, not {len(lineage)}")
    require_hashes(hashes, "a sequence hash of a chain")
    keys = [key for key, _ in lineage] if lineage else hashes
    if len(set(hashes)) != len(hashes) or len(set(keys)) != len(keys):
        raise InvalidInput("a block of a chain is given twice")
    return keys
