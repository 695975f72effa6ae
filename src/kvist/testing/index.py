"""`IndexMachine`: any events of any workers, and an `Index` agrees with plain dicts. `check_index`: it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvist.blocks.events import Cleared, Event, EventData, Removed, Stored, Tier
from kvist.errors import NotFound
from kvist.router.index import TIERS, Index, Overlap, Pool

_Path = tuple[int, ...]  # local hashes from the root, or from a negative number that stands for an unknown parent

_POOLS: Final = st.sampled_from([(1, 0), (1, 0), (1, 0), (1, 1), ("b", 0)])
_TIERS: Final = st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.EXTERNAL])
_TRUNKS: Final = st.sampled_from([(1,) * 9, (1,) * 9, (1, 1, 1, 1, 2, 2, 2, 2, 2), (1, 1, 2, 1, 2, 1, 2, 1, 2), (2, 1)])
_PATHS: Final = st.tuples(_TRUNKS, st.integers(1, 9)).map(lambda drawn: drawn[0][: drawn[1]])
_SALTS: Final = st.sampled_from([0, 0, 1])


class IndexMachine(RuleBasedStateMachine):
    """Stores, removals in any order, clears and lost workers, against dicts of paths.

    Blocks are named by their path and a salt, so that one pool may know a block by two names.
    """

    keep_orphans = False

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(keep_orphans=self.keep_orphans)
        self.model: dict[Pool, dict[Tier, dict[int, _Path]]] = {}
        self.known: dict[tuple[Pool, _Path, int], int] = {}

    def name(self, pool: Pool, path: _Path, salt: int) -> int:
        """What the pool calls the last block of a path."""
        return self.known.setdefault((pool, path, salt), 100 + len(self.known))

    def apply(self, pool: Pool, data: EventData, tier: Tier = Tier.DEVICE) -> None:
        """One event; the index does not care for its number."""
        self.index.apply(pool[0], Event(0, data, tier, pool[1]))

    @rule(pool=_POOLS, tier=_TIERS, trunk=_TRUNKS, salt=_SALTS, choice=st.integers(0, 8), many=st.integers(1, 9))
    def store(self, pool: Pool, tier: Tier, trunk: _Path, salt: int, choice: int, many: int) -> None:
        """A run after the root or a block that the pool has."""
        held: set[int] = set().union(*self.model.get(pool, {}).values())
        known = [upto for upto in range(1, len(trunk)) if self.name(pool, trunk[:upto], salt) in held]
        start = [0, *known][-choice % (len(known) + 1)]
        self.store_from(pool, tier, trunk[: start + many], start, salt)

    @rule(pool=_POOLS, tier=_TIERS, path=_PATHS, start=st.integers(0, 8), salt=_SALTS)
    def store_anywhere(self, pool: Pool, tier: Tier, path: _Path, start: int, salt: int) -> None:
        """A run whose parent may be unknown."""
        self.store_from(pool, tier, path, min(start, len(path) - 1), salt)

    def store_from(self, pool: Pool, tier: Tier, path: _Path, start: int, salt: int) -> None:
        """The blocks of a path from ``start`` on."""
        names = [self.name(pool, path[: i + 1], salt) for i in range(start, len(path))]
        parent = self.name(pool, path[:start], salt) if start else None
        data = Stored(names, parent, path[start:])
        tiers = self.model.get(pool, {})
        above: _Path | None = ()
        if parent is not None:
            above = next((held[parent] for held in tiers.values() if parent in held), None)
        if above is None and not self.keep_orphans:
            with pytest.raises(NotFound):
                self.apply(pool, data, tier)
            return
        self.apply(pool, data, tier)
        above = (-(parent or 0),) if above is None else above
        tiers = self.model.setdefault(pool, {tier: {} for tier in TIERS})
        for name, local in zip(names, path[start:], strict=True):
            above = (*above, local)
            tiers[tier][name] = above
            for held in tiers.values():
                held |= {below: above + place[1:] for below, place in held.items() if place[0] == -name}

    @rule(pool=_POOLS, tier=_TIERS, data=st.data())
    def remove(self, pool: Pool, tier: Tier, data: st.DataObject) -> None:
        """Some blocks in any order, and some that are not there."""
        held = self.model.get(pool, {}).get(tier, {})
        names = data.draw(st.lists(st.sampled_from(list(held) or [1]) | st.just(1), max_size=6))
        self.apply(pool, Removed(names), tier)
        self.model.setdefault(pool, {tier: {} for tier in TIERS})
        for name in names:
            held.pop(name, None)

    @rule(pool=_POOLS, tier=_TIERS, path=_PATHS, salt=_SALTS, tail_first=st.booleans(), many=st.integers(1, 9))
    def evict(self, pool: Pool, tier: Tier, path: _Path, salt: int, tail_first: bool, many: int) -> None:
        """A stretch of a path, as caches do it."""
        names = [self.name(pool, path[: i + 1], salt) for i in range(len(path))]
        names = names[: -many - 1 : -1] if tail_first else names[:many]
        self.apply(pool, Removed(names), tier)
        for name in names:
            self.model.setdefault(pool, {tier: {} for tier in TIERS})[tier].pop(name, None)

    @rule(pool=_POOLS, tier=_TIERS, what=st.sampled_from(["nothing"] * 6 + ["clear", "lose"]))
    def end(self, pool: Pool, tier: Tier, what: str) -> None:
        """Now and then all of a pool's tiers are empty, or its worker is gone."""
        if what == "clear":
            self.apply(pool, Cleared(), tier)
            self.model[pool] = {tier: {} for tier in TIERS}
        elif what == "lose" and pool in self.model:
            self.index.remove_worker(*pool)
            del self.model[pool]
        elif what == "lose":
            with pytest.raises(NotFound):
                self.index.remove_worker(*pool)

    @rule(path=_PATHS)
    def find(self, path: _Path) -> None:
        """Every prompt."""
        assert self.index.find(path) == self.expected(path)

    @rule()
    def tell(self) -> None:
        """Another index, told all, knows all."""
        other = Index(keep_orphans=self.keep_orphans)
        for worker, rank in self.model:
            other.add_worker(worker, rank)
            for event in self.index.events_of(worker, rank):
                other.apply(worker, event)
        check_index(other)
        self.agree(other)

    @invariant()
    def whole(self) -> None:
        """After every step."""
        check_index(self.index)
        self.agree(self.index)

    def agree(self, index: Index) -> None:
        """The same pools and names, and the same overlaps with the paths of all blocks."""
        assert set(index.pools) == set(self.model)
        paths: set[_Path] = set()
        for pool, tiers in self.model.items():
            for tier, held in tiers.items():
                assert index.hashes_of(*pool, tier=tier) == held.keys()
                assert index.num_blocks(*pool, tier=tier) == len(held)
                paths.update(held.values())
        for path in paths:
            assert index.find(path) == self.expected(path)

    def expected(self, path: _Path) -> dict[Pool, Overlap]:
        """What `Index.find` must say."""
        result = {}
        for pool, tiers in self.model.items():
            depths: list[int] = []
            blocks: set[_Path] = set()
            for tier in TIERS:
                blocks.update(tiers[tier].values())
                depths.append(next((i for i in range(len(path)) if path[: i + 1] not in blocks), len(path)))
            if depths[-1]:
                result[pool] = Overlap(*depths)
        return result


class OrphanMachine(IndexMachine):
    """With an index that keeps runs whose parent is unknown."""

    keep_orphans = True


def check_index(index: Index) -> None:
    """Check what must be true of an index at any time: its tree holds what its maps say, and nothing in vain.

    Raises:
        AssertionError: it is not.
    """
    tree = index._tree
    starts = [tree.root, *(start for orphans in index._orphans.values() for start in orphans.values())]
    found: dict[int, dict[int, int]] = {bit: {} for bit in tree.maps}
    for start in starts:
        assert start.parent is None
        assert start is tree.root or start.children
        for run in tree.walk(start):
            assert run.parent is not None
            assert run.parent.children[run.blocks[0]] is run
            assert run.held or run.children
            assert run.held == sum(run.names)
            for bit, names in run.names.items():
                assert names
                assert len(names) % len(run.blocks) == 0
                assert found[bit].keys().isdisjoint(names)
                assert len(set(names)) == len(names)
                found[bit] |= dict.fromkeys(names, id(run))
    assert found == {bit: _identities(held_by) for bit, held_by in tree.maps.items()}


def _identities(held_by: Mapping[int, object]) -> dict[int, int]:
    return {name: id(run) for name, run in held_by.items()}
