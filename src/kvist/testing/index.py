"""`IndexMachine` and `drive`: any events of any workers, and an `Index` agrees with plain dicts.

`check_index` says whether an index is whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvist.blocks.events import Cleared, Event, EventData, Removed, Stored, Tier
from kvist.errors import NotFound
from kvist.router.index import TIERS, Index, Overlap, Pool

Path = tuple[int, ...]  # local hashes from the root

_POOLS: Final[list[Pool]] = [(1, 0), (1, 0), (1, 0), (1, 1), ("b", 0)]
_TIERS: Final = [Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.EXTERNAL]
_TRUNKS: Final = [(1,) * 9, (1,) * 9, (1, 1, 1, 1, 2, 2, 2, 2, 2), (1, 1, 2, 1, 2, 1, 2, 1, 2), (2, 1)]
_SALTS: Final = [0, 0, 1]
_EVICTED: Final = [(0,), (0,), (1,), (1, 0), (2, 1, 0)]  # salts
_CHECKED: Final = 50  # steps from one look at everything to the next


class IndexModel:
    """An index, and what it should say, as dicts of paths.

    Attributes:
        index: the index, which is told all that the model is.
        held: of each pool and tier the path to each block, by its name.
    """

    def __init__(self) -> None:
        self.index = Index()
        self.held: dict[Pool, dict[Tier, dict[int, Path]]] = {}
        self._names: dict[tuple[Pool, Path, int], int] = {}

    def name(self, pool: Pool, path: Path, salt: int) -> int:
        """What a cache would call the last block of a path; salts give it more names."""
        return self._names.setdefault((pool, path, salt), 100 + len(self._names))

    def paths(self, pool: Pool, tier: Tier) -> dict[int, Path]:
        """The blocks of one tier of a pool."""
        return self.held.get(pool, {}).get(tier, {})

    def path_of(self, pool: Pool, tier: Tier, name: int) -> Path | None:
        """What a tier means by a name: its own block before that of another tier."""
        return next((held[name] for each in (tier, *TIERS) if name in (held := self.paths(pool, each))), None)

    def store(self, pool: Pool, tier: Tier, names: Sequence[int], parent: int | None, blocks: Path) -> None:
        """A run. The index must refuse it if the parent is unknown."""
        above = () if parent is None else self.path_of(pool, tier, parent)
        data = Stored(names, parent, blocks)
        if above is None:
            with pytest.raises(NotFound):
                self._apply(pool, data, tier)
            return
        self._apply(pool, data, tier)
        held = self._known(pool)[tier]
        for count, name in enumerate(names, start=1):
            held[name] = above + blocks[:count]

    def store_path(self, pool: Pool, tier: Tier, path: Path, start: int, salt: int) -> None:
        """The blocks of a path from number ``start`` on, as a cache names them."""
        names = [self.name(pool, path[: i + 1], salt) for i in range(start, len(path))]
        parent = self.name(pool, path[:start], salt) if start else None
        self.store(pool, tier, names, parent, path[start:])

    def remove(self, pool: Pool, tier: Tier, names: Sequence[int]) -> None:
        """These blocks, known or not."""
        self._apply(pool, Removed(names), tier)
        held = self._known(pool)[tier]
        for name in names:
            held.pop(name, None)

    def evict(self, pool: Pool, tier: Tier, path: Path, salts: Sequence[int], many: int, *, tail_first: bool) -> None:
        """A stretch of a path, as caches do it, under one name of each block after the other."""
        upto = range(len(path), 0, -1) if tail_first else range(1, len(path) + 1)
        self.remove(pool, tier, [self.name(pool, path[:each], salt) for salt in salts for each in upto[:many]])

    def clear(self, pool: Pool, tier: Tier) -> None:
        """All tiers of a pool are empty, whichever told it."""
        self._apply(pool, Cleared(), tier)
        self.held.pop(pool, None)
        self._known(pool)

    def lose(self, pool: Pool) -> None:
        """A worker is gone, if it was there."""
        if pool in self.held:
            self.index.remove_worker(*pool)
            del self.held[pool]
        else:
            with pytest.raises(NotFound):
                self.index.remove_worker(*pool)

    def check(self) -> None:
        """The index is whole and says what it should.

        Raises:
            AssertionError: it is not, or does not.
        """
        check_index(self.index)
        self._agree(self.index)

    def check_told(self) -> None:
        """Another index, told all, knows all.

        Raises:
            AssertionError: it does not.
        """
        other = Index()
        for worker, rank in self.held:
            other.add_worker(worker, rank)
            for event in self.index.events_of(worker, rank):
                other.apply(worker, event)
        check_index(other)
        self._agree(other)

    def check_find(self, path: Path) -> None:
        """One prompt.

        Raises:
            AssertionError: it is not found as it should be.
        """
        assert self.index.find(path) == _overlaps(self._reach(), path)

    def _apply(self, pool: Pool, data: EventData, tier: Tier) -> None:
        self.index.apply(pool[0], Event(0, data, tier, pool[1]))  # it does not care for the number

    def _known(self, pool: Pool) -> dict[Tier, dict[int, Path]]:
        return self.held.setdefault(pool, {tier: {} for tier in TIERS})

    def _agree(self, index: Index) -> None:
        """The same pools and names, and the same overlaps with the paths of all blocks."""
        assert set(index.pools) == set(self.held)
        for pool, tiers in self.held.items():
            for tier, held in tiers.items():
                assert index.hashes_of(*pool, tier=tier) == held.keys()
                assert index.num_blocks(*pool, tier=tier) == len(held)
        reach = self._reach()
        for path in {path for tiers in self.held.values() for held in tiers.values() for path in held.values()}:
            assert index.find(path) == _overlaps(reach, path)

    def _reach(self) -> dict[Pool, list[set[Path]]]:
        """What each pool has in each tier or a faster one."""
        result: dict[Pool, list[set[Path]]] = {}
        for pool, tiers in self.held.items():
            reach: set[Path] = set()
            result[pool] = [reach := reach | set(tiers[tier].values()) for tier in TIERS]
        return result


def _overlaps(reach: Mapping[Pool, Sequence[set[Path]]], path: Path) -> dict[Pool, Overlap]:
    """What `Index.find` must say."""
    result = {}
    for pool, of_tiers in reach.items():
        depth = 0
        depths = []
        for blocks in of_tiers:
            while depth < len(path) and path[: depth + 1] in blocks:
                depth += 1
            depths.append(depth)
        if depth:
            result[pool] = Overlap(*depths)
    return result


class IndexMachine(RuleBasedStateMachine):
    """Stores, removals in any order, clears and lost workers, against an `IndexModel`.

    Caches name blocks by their path, and a salt gives a pool more names for one; other names are drawn from a few and
    may so mean now this block, now that one, and another in each tier.
    """

    pools = st.sampled_from(_POOLS)
    tiers = st.sampled_from(_TIERS)
    trunks = st.sampled_from(_TRUNKS)
    paths = st.tuples(trunks, st.integers(1, 9)).map(lambda drawn: drawn[0][: drawn[1]])
    salts = st.sampled_from(_SALTS)
    few = st.integers(1, 8)

    def __init__(self) -> None:
        super().__init__()
        self.model = IndexModel()

    @rule(pool=pools, tier=tiers, trunk=trunks, salt=salts, choice=st.integers(0, 8), many=st.integers(1, 9))
    def store(self, pool: Pool, tier: Tier, trunk: Path, salt: int, choice: int, many: int) -> None:
        """A run after the root or a block that the pool has."""
        starts = [0, *_known_depths(self.model, pool, tier, trunk, salt)]
        start = starts[-choice % len(starts)]
        self.model.store_path(pool, tier, trunk[: start + many], start, salt)

    @rule(pool=pools, tier=tiers, path=paths, start=st.integers(0, 8), salt=salts)
    def store_anywhere(self, pool: Pool, tier: Tier, path: Path, start: int, salt: int) -> None:
        """A run whose parent may be unknown."""
        self.model.store_path(pool, tier, path, min(start, len(path) - 1), salt)

    @rule(
        pool=pools,
        tier=tiers,
        names=st.lists(few, unique=True, max_size=4),
        parent=st.none() | few,
        trunk=trunks | paths,
    )
    def store_few(self, pool: Pool, tier: Tier, names: list[int], parent: int | None, trunk: Path) -> None:
        """A run of a few names, which may be somewhere else, below itself, or after itself."""
        count = min(len(names), len(trunk))
        self.model.store(pool, tier, names[:count], parent, trunk[:count])

    @rule(pool=pools, tier=tiers, data=st.data())
    def remove(self, pool: Pool, tier: Tier, data: st.DataObject) -> None:
        """Some blocks in any order, and some that are not there."""
        held = list(self.model.paths(pool, tier)) or [1]
        self.model.remove(pool, tier, data.draw(st.lists(st.sampled_from(held) | st.just(1), max_size=6)))

    @rule(
        pool=pools,
        tier=tiers,
        path=paths,
        salts=st.sampled_from(_EVICTED),
        tail_first=st.booleans(),
        many=st.integers(1, 9),
    )
    def evict(self, pool: Pool, tier: Tier, path: Path, salts: Path, tail_first: bool, many: int) -> None:
        """A stretch of a path, as caches do it."""
        self.model.evict(pool, tier, path, salts, many, tail_first=tail_first)

    @rule(pool=pools, tier=tiers, what=st.sampled_from(["nothing"] * 6 + ["clear", "lose"]))
    def end(self, pool: Pool, tier: Tier, what: str) -> None:
        """Now and then all of a pool's tiers are empty, or its worker is gone."""
        if what == "clear":
            self.model.clear(pool, tier)
        elif what == "lose":
            self.model.lose(pool)

    @rule(path=paths)
    def find(self, path: Path) -> None:
        """Every prompt."""
        self.model.check_find(path)

    @rule()
    def tell(self) -> None:
        """Another index, told all, knows all."""
        self.model.check_told()

    @invariant()
    def whole(self) -> None:
        """After every step."""
        self.model.check()


def drive(seed: int, steps: int) -> None:
    """Tell an index ``steps`` events of a few full caches, and look at all that it says every 50.

    The paths are longer than the machine's, so that runs are cut and joined; blocks have several names, and names move
    between places and tiers.

    Raises:
        AssertionError: the index is wrong.
    """
    rng = random.Random(seed)
    model = IndexModel()
    trunks = list(_trunks_of(rng))
    for step in range(1, steps + 1):
        _step(model, rng, trunks)
        trunk = rng.choice(trunks)
        if not step % 5:
            model.check_find(trunk[: rng.randint(1, len(trunk))])
        if not step % _CHECKED or step == steps:
            model.check()
            model.check_told()


def _trunks_of(rng: random.Random) -> Iterator[Path]:
    """Six paths of up to 24 blocks, each of which leaves another somewhere."""
    trunk: Path = ()
    for _ in range(6):
        start = rng.randint(0, min(len(trunk), 23))
        trunk = trunk[:start] + tuple(rng.randint(1, 2) for _ in range(rng.randint(start + 1, 24) - start))
        yield trunk


def _step(model: IndexModel, rng: random.Random, trunks: Sequence[Path]) -> None:
    pool, tier, salt = rng.choice(_POOLS), rng.choice(_TIERS), rng.choice(_SALTS)
    trunk = rng.choice(trunks)
    held = model.paths(pool, tier)
    what = rng.random()
    if what < 0.3:
        start = rng.choice([0, *_known_depths(model, pool, tier, trunk, salt)])
        model.store_path(pool, tier, trunk[: rng.randint(start + 1, len(trunk))], start, salt)
    elif what < 0.36:
        start = rng.randrange(len(trunk))
        model.store_path(pool, tier, trunk, start, salt)  # the parent may be unknown
    elif what < 0.46 and held:  # new names for blocks that are there
        path = rng.choice(list(held.values()))
        model.store_path(pool, tier, path, 0, rng.choice([1, 2]))
    elif what < 0.56:  # names that may be elsewhere, as others or themselves say
        names = list({*rng.sample(range(1, 9), 4), *rng.sample(list(held), min(3, len(held)))})
        rng.shuffle(names)
        names = names[: rng.randint(1, len(trunk))]
        start = rng.randint(0, len(trunk) - len(names))
        parent = rng.choice([None, *range(1, 9), *held])
        model.store(pool, tier, names, parent, trunk[start : start + len(names)])
    elif what < 0.68 and held:  # one end of a path loses names
        longest = max(rng.sample(list(held.values()), min(4, len(held))), key=len)
        at_end = [name for name, path in held.items() if path[: len(longest)] == longest]
        model.remove(pool, tier, rng.sample(at_end, rng.randint(1, len(at_end))))
    elif what < 0.8:
        names = rng.sample(list(held), min(len(held), rng.randint(0, 4)))
        model.remove(pool, tier, [*names, 1])
    elif what < 0.985:
        salts = rng.choice(_EVICTED)
        model.evict(pool, tier, trunk, salts, rng.randint(1, len(trunk)), tail_first=rng.random() < 0.5)
    elif what < 0.995:
        model.clear(pool, tier)
    else:
        model.lose(pool)


def _known_depths(model: IndexModel, pool: Pool, tier: Tier, trunk: Path, salt: int) -> list[int]:
    """How many blocks of a path lead to one, not the last, whose name the pool knows."""
    depths = range(1, len(trunk))
    return [upto for upto in depths if model.path_of(pool, tier, model.name(pool, trunk[:upto], salt)) is not None]


def check_index(index: Index) -> None:
    """Check what must be true of an index at any time: its tree holds what its maps say, and nothing in vain.

    Raises:
        AssertionError: it is not.
    """
    tree = index._tree
    found: dict[int, dict[int, int]] = {bit: {} for bit in tree.maps}
    assert tree.root.parent is None
    for run in tree.walk(tree.root):
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
