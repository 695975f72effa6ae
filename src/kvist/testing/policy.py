"""`PolicyTests`: the conformance suite of `kvist.blocks.policy.Policy`. Run it on your own policy.

Subclass it, and say how to make an empty one:

    class TestMyPolicy(PolicyTests):
        def make_policy(self) -> Policy[int]: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.blocks.policy import Policy
from kvist.errors import AlreadyExists, InvalidInput, KvistError, NotFound, PoolExhausted

_keys = st.lists(st.integers(0, 12), max_size=6)
_calls = st.lists(
    st.tuples(st.sampled_from(["insert", "touch", "remove"]), _keys)
    | st.tuples(st.just("evict"), st.integers(0, 6), st.frozensets(st.integers(0, 12), max_size=6)),
    max_size=30,
)


class PolicyTests(ABC):
    """What every `Policy` must do, whatever its order is."""

    @abstractmethod
    def make_policy(self) -> Policy[int]:
        """An empty policy. Two of them, called alike, give the same orders."""

    def filled(self, *chains: list[int]) -> Policy[int]:
        """A policy into which these chains were inserted, one after the other."""
        policy = self.make_policy()
        for chain in chains:
            policy.insert(chain)
        return policy

    def test_an_empty_policy(self) -> None:
        """Zero case."""
        policy = self.make_policy()
        assert len(policy) == 0
        assert list(policy) == []
        assert 1 not in policy
        assert policy.evict(0) == []
        with pytest.raises(PoolExhausted):
            policy.evict(1)
        policy.insert([])
        policy.touch([])
        policy.remove([])
        assert len(policy) == 0

    def test_it_holds_what_was_inserted(self) -> None:
        """Each key once."""
        policy = self.filled([1, 2], [3])
        assert len(policy) == 3
        assert sorted(policy) == [1, 2, 3]
        assert 1 in policy
        assert 4 not in policy

    def test_iterating_changes_nothing(self) -> None:
        """However often."""
        policy = self.filled([1, 2, 3], [4])
        assert list(policy) == list(policy)
        assert len(policy) == 4

    def test_it_evicts_in_the_order_it_says(self) -> None:
        """All at once, or one at a time."""
        chains = [1, 2, 3], [4, 5], [6]
        order = list(self.filled(*chains))
        assert self.filled(*chains).evict(6) == order
        policy = self.filled(*chains)
        assert [policy.evict(1)[0] for _ in range(6)] == order
        assert len(policy) == 0

    def test_what_was_evicted_is_gone_and_may_come_back(self) -> None:
        """As any new key."""
        policy = self.filled([1, 2, 3])
        (gone,) = policy.evict(1)
        assert gone not in policy
        assert len(policy) == 2
        policy.insert([gone])
        assert gone in policy

    def test_the_tail_of_a_chain_goes_before_its_root(self) -> None:
        """Of one insert, and of one touch."""
        assert self.filled([1, 2, 3]).evict(3) == [3, 2, 1]
        policy = self.filled([3], [2], [1])
        policy.touch([1, 2, 3])
        assert policy.evict(3) == [3, 2, 1]

    def test_a_key_given_twice_to_touch_counts_where_it_comes_first(self) -> None:
        """No error: one chain may come to a block twice."""
        policy, same = self.filled([1, 2, 3]), self.filled([1, 2, 3])
        policy.touch([2, 3, 2])
        same.touch([2, 3])
        assert list(policy) == list(same)

    def test_what_is_protected_stays(self) -> None:
        """The others go in their order."""
        policy = self.filled([1, 2, 3], [4, 5])
        order = [key for key in policy if key not in {2, 4}]
        assert policy.evict(3, frozenset({2, 4, 99})) == order
        assert sorted(policy) == [2, 4]

    def test_eviction_is_all_or_nothing(self) -> None:
        """One too many, and nothing has changed."""
        policy = self.filled([1, 2, 3])
        before = list(policy)
        with pytest.raises(PoolExhausted):
            policy.evict(4)
        with pytest.raises(PoolExhausted):
            policy.evict(3, {1})
        with pytest.raises(InvalidInput):
            policy.evict(-1)
        assert list(policy) == before

    def test_removed_keys_are_gone(self) -> None:
        """The others keep their order."""
        policy = self.filled([1, 2, 3, 4])
        rest = [key for key in policy if key not in {2, 3}]
        policy.remove([2, 3])
        assert list(policy) == rest

    @pytest.mark.parametrize(
        ("call", "error"),
        [
            (lambda policy: policy.insert([9, 1]), AlreadyExists),
            (lambda policy: policy.insert([9, 9]), AlreadyExists),
            (lambda policy: policy.touch([1, 9]), NotFound),
            (lambda policy: policy.remove([1, 9]), NotFound),
        ],
    )
    def test_wrong_keys_are_refused_before_anything_changes(
        self, call: Callable[[Policy[int]], None], error: type[KvistError]
    ) -> None:
        """Typed errors."""
        policy = self.filled([1, 2], [3])
        before = list(policy)
        with pytest.raises(error):
            call(policy)
        assert list(policy) == before

    @settings(deadline=None)
    @given(calls=_calls)
    def test_any_calls_keep_it_whole(self, calls: list[tuple[object, ...]]) -> None:
        """The keys are those of a plain set; what raises changes nothing; a second policy does the same."""
        policy, twin = self.make_policy(), self.make_policy()
        model: set[int] = set()
        for name, *arguments in calls:
            before = list(policy)
            results = []
            for each in (policy, twin):
                try:
                    results.append(getattr(each, str(name))(*arguments))
                except KvistError as error:
                    results.append(type(error))
                    assert list(each) == before
            assert results[0] == results[1]
            if isinstance(results[0], list):
                assert len(results[0]) == arguments[0]
                assert model.issuperset(results[0])
                model.difference_update(results[0])
            elif results[0] is None and name != "touch":
                changed = arguments[0]
                assert isinstance(changed, list)
                model = model | set(changed) if name == "insert" else model - set(changed)
            assert set(policy) == model
            assert len(policy) == len(model)
            assert list(policy) == list(twin)
