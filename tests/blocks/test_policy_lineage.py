"""Leaves go first, the oldest first, and a parent becomes a leaf when the last of its children went."""

from __future__ import annotations

import random
from collections.abc import Mapping, Set

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.blocks.policy import Lineage, Policy
from kvist.testing.policy import PolicyTests

# 0 <- 1 <- 2 <- 3 and 1 <- 4 <- 5, 4 <- 6; 7 <- 8; the parent of 9 is never held
TREE: Mapping[int, int | None] = {0: None, 1: 0, 2: 1, 3: 2, 4: 1, 5: 4, 6: 4, 8: 7, 9: 99}


class TestLineageWithoutParents(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Lineage({})


class TestLineage(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Lineage(TREE)

    def may_go(self, unpinned: set[int], protected: Set[int]) -> set[int]:
        staying: set[int] = set()
        for key in unpinned & protected:
            above: int | None = key
            while above in unpinned:
                staying.add(above)
                above = TREE.get(above)
        return unpinned - staying


def test_the_example_of_dynamo() -> None:
    """Two requests that share two blocks; a third takes 0, 1, 2 back into use; the others go, leaves first."""
    parents = {0: None, 1: 0, 2: 1, 3: 2, 4: 3, 5: 1, 6: 5}
    policy = Lineage(parents)
    policy.insert([0, 1, 2, 3, 4], pinned=True)
    policy.insert([5, 6], pinned=True)
    policy.unpin([2, 3, 4])
    policy.unpin([0, 1, 5, 6])
    assert list(policy) == [4, 3, 2, 6, 5, 1, 0]
    policy.pin([0, 1, 2])
    assert policy.evict(4) == [4, 3, 6, 5]


def test_a_parent_stays_until_its_last_child_went() -> None:
    policy = Lineage({2: 1, 3: 1})
    policy.insert([1])
    policy.insert([2])
    policy.insert([3])
    assert policy.evict(1) == [2]
    assert list(policy) == [3, 1]


def test_a_parent_that_is_a_leaf_again_has_its_own_age() -> None:
    """It is older than what came between, and goes before it."""
    policy = Lineage({2: 1})
    policy.insert([1])
    policy.insert([9])
    policy.insert([2])
    assert policy.evict(3) == [9, 2, 1]
    policy.insert([1])
    policy.insert([2])
    policy.insert([9])
    assert policy.evict(3) == [2, 1, 9]


def test_a_child_in_use_keeps_no_parent() -> None:
    """The owner of a chain pins all of it; a parent that it does not pin is a leaf."""
    policy = Lineage({2: 1})
    policy.insert([1])
    policy.insert([2], pinned=True)
    assert list(policy) == [1]
    policy.unpin([2])
    assert list(policy) == [2, 1]


def test_a_parent_that_comes_after_its_child_is_no_leaf() -> None:
    policy = Lineage({2: 1})
    policy.insert([2])
    policy.insert([1])
    policy.touch([2])
    assert list(policy) == [2, 1]


def test_a_touch_makes_a_leaf_young() -> None:
    policy = Lineage({2: 1, 4: 3})
    policy.insert([1, 2])
    policy.insert([3, 4])
    policy.touch([2])
    assert list(policy) == [4, 3, 2, 1]


def test_what_is_protected_keeps_its_ancestors() -> None:
    policy = Lineage({2: 1, 3: 2, 4: 1})
    policy.insert([1, 2, 3])
    policy.insert([4])
    assert policy.evict(1, {3}) == [4]
    assert list(policy) == [3, 2, 1]
    policy.insert([4])
    assert policy.evict(2, {4}) == [3, 2]


_calls = st.lists(
    st.tuples(st.sampled_from(["flip", "touch", "remove"]), st.lists(st.integers(0, 40), max_size=6, unique=True))
    | st.tuples(st.just("evict"), st.integers(0, 4)),
    max_size=60,
)


@settings(deadline=None)
@given(parents=st.lists(st.integers(0, 40), min_size=41, max_size=41), calls=_calls)
def test_it_is_the_plain_rule(parents: list[int], calls: list[tuple[str, list[int] | int]]) -> None:
    compare_with_the_plain_rule(parents, calls)


def test_it_is_the_plain_rule_for_long() -> None:
    rng = random.Random(0)
    calls: list[tuple[str, list[int] | int]] = []
    for _ in range(3000):
        name = rng.choices(["flip", "touch", "remove", "evict"], [10, 20, 1, 1])[0]
        calls.append((name, rng.randrange(5) if name == "evict" else rng.sample(range(41), rng.randrange(7))))
    compare_with_the_plain_rule([rng.randrange(41) for _ in range(41)], calls)


def compare_with_the_plain_rule(parents: list[int], calls: list[tuple[str, list[int] | int]]) -> None:
    """The same order as by looking through all keys for the oldest leaf. To flip is to insert, to pin or to unpin."""
    tree = {key: parent if parent < key else None for key, parent in enumerate(parents)}
    policy = Lineage(tree)
    ticks: dict[int, int] = {}
    clock = 0
    for name, argument in calls:
        if isinstance(argument, int):
            n = min(argument, len(ticks))
            assert policy.evict(n) == [_oldest_leaf(ticks, tree) for _ in range(n)]
            continue
        for key in reversed(argument):
            held, unpinned = key in policy, key in ticks
            if name == "remove":
                policy.remove([key] if held else [])
                ticks.pop(key, None)
            elif name == "touch":
                policy.touch([key] if held else [])
                if unpinned:
                    ticks[key] = clock = clock + 1
            elif unpinned:
                policy.pin([key])
                del ticks[key]
            else:
                policy.unpin([key]) if held else policy.insert([key])
                ticks[key] = clock = clock + 1
    order = list(policy)
    assert order == [_oldest_leaf(ticks, tree) for _ in order]
    assert not ticks


def _oldest_leaf(ticks: dict[int, int], tree: dict[int, int | None]) -> int:
    parents = {tree[key] for key in ticks}
    leaf = min((key for key in ticks if key not in parents), key=ticks.__getitem__)
    del ticks[leaf]
    return leaf
