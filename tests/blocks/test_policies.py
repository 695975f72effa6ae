"""Every policy passes the suite, has its own order, and none beats Belady's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.driving import misses
from kvist.blocks.policy import POLICIES, Arc, Belady, Fifo, Lfu, Lru, MultiLru, Policy, S3Fifo, Sieve, make_policy
from kvist.errors import InvalidInput
from kvist.testing.policy import PolicyTests

CAPACITY = 20


class TestLru(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Lru()


class TestFifo(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Fifo()


class TestLfu(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Lfu()


class TestSieve(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Sieve()


class TestS3Fifo(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return S3Fifo(CAPACITY)


class TestS3FifoTooSmall(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return S3Fifo(4)


class TestArc(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Arc(CAPACITY)


class TestArcTooSmall(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Arc(4)


class TestMultiLru(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return MultiLru(CAPACITY)


class TestBeladyWithoutFuture(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Belady([])


@pytest.mark.parametrize("name", POLICIES)
def test_a_name_makes_a_policy(name: str) -> None:
    policy: Policy[int] = make_policy(name, capacity=8, parents={2: 1})
    policy.insert([1, 2])
    assert policy.evict(2) == [2, 1]


def test_unknown_names_and_no_capacity_are_refused() -> None:
    with pytest.raises(InvalidInput, match="arc, fifo, lfu, lineage, lru, multi_lru, s3fifo, sieve, not 'mru'"):
        make_policy("mru", capacity=8, parents={})
    with pytest.raises(InvalidInput, match="1 block or more, not 0"):
        make_policy("lru", capacity=0, parents={})


def fewest_misses(requests: list[int], capacity: int) -> int:
    """Of all ways to choose what goes, the best: by trying all of them."""
    reached = {frozenset[int](): 0}  # what the pool may hold, and with how many misses
    for key in requests:
        after: dict[frozenset[int], int] = {}
        for held, missed in reached.items():
            hit = key in held
            choices = [held] if hit or len(held) < capacity else [held - {victim} for victim in held]
            for kept in choices:
                after[kept | {key}] = min(missed + (not hit), after.get(kept | {key}, missed + 1))
        reached = after
    return min(reached.values())


@settings(deadline=None)
@given(requests=st.lists(st.integers(0, 6), max_size=20), capacity=st.integers(1, 4))
def test_belady_has_the_fewest_misses_that_are_possible(requests: list[int], capacity: int) -> None:
    assert sum(misses(Belady(requests), capacity, requests)) == fewest_misses(requests, capacity)


@settings(deadline=None)
@given(requests=st.lists(st.integers(0, 12), max_size=80), capacity=st.integers(1, 8))
def test_none_has_fewer_misses_than_belady(requests: list[int], capacity: int) -> None:
    fewest = sum(misses(Belady(requests), capacity, requests))
    for name in POLICIES:
        policy: Policy[int] = make_policy(name, capacity=capacity, parents={})
        assert sum(misses(policy, capacity, requests)) >= fewest, name


_key = st.integers(0, 9)


@settings(deadline=None)
@given(
    before=st.lists(_key, max_size=20),
    pinned=st.frozensets(_key, max_size=5),
    after=st.lists(_key, max_size=20),
    capacity=st.integers(5, 9),
)
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_in_use_is_never_evicted(
    name: str, before: list[int], pinned: frozenset[int], after: list[int], capacity: int
) -> None:
    """Whatever comes, and however often it is used meanwhile."""
    policy: Policy[int] = make_policy(name, capacity=capacity, parents={})
    misses(policy, capacity, before)
    pinned = frozenset(key for key in pinned if key in policy)
    policy.pin(sorted(pinned))
    if len(pinned) < capacity:
        misses(policy, capacity, after)
    assert all(key in policy for key in pinned)
    policy.unpin(sorted(pinned))
    assert len(list(policy)) == len(policy)
