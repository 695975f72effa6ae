"""`PolicyTests`: the conformance suite of `kvist.blocks.policy.Policy`. Run it on your own policy.

Subclass it, and say how to make an empty one:

    class TestMyPolicy(PolicyTests):
        def make_policy(self) -> Policy[int]: ...

The suite says nothing of a policy's own order, but for what the contract says: the tail of a chain before its root.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvist.blocks.policy import Policy
from kvist.errors import AlreadyExists, Conflict, InvalidInput, KvistError, NotFound, PoolExhausted

_key = st.integers(0, 12)
_chain = st.lists(_key, max_size=5, unique=True)
_calls = st.lists(
    st.tuples(st.sampled_from(["insert", "insert pinned", "expect", "touch", "pin", "unpin", "remove"]), _chain)
    | st.tuples(st.sampled_from(["insert", "touch", "pin", "unpin", "remove"]), st.lists(_key, max_size=3))
    | st.tuples(st.just("evict"), st.integers(0, 6), st.frozensets(_key, max_size=6)),
    max_size=40,
)


class PolicyTests(ABC):
    """What every `Policy` must do, whatever its order is."""

    @abstractmethod
    def make_policy(self) -> Policy[int]:
        """An empty policy. Two of them, called alike, give the same orders."""

    def may_go(self, unpinned: set[int], protected: Set[int]) -> set[int]:
        """Which of these keys, all that are held and not pinned, may go. Override it for a policy that keeps more."""
        return unpinned - protected

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
        policy.pin([])
        policy.unpin([])
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
        """Whatever else goes. A key that is not held may be protected."""
        policy = self.filled([1, 2, 3], [4, 5])
        protected = frozenset({2, 4, 99})
        may_go = self.may_go({1, 2, 3, 4, 5}, protected)
        assert set(policy.evict(len(may_go), protected)) == may_go
        assert set(policy) == {1, 2, 3, 4, 5} - may_go

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

    def test_what_is_pinned_stays(self) -> None:
        """It is held, and neither goes nor is counted among what may."""
        policy = self.filled([1, 2, 3])
        policy.insert([4, 5], pinned=True)
        policy.pin([2])
        assert len(policy) == 5
        assert {2, 4, 5}.isdisjoint(policy)
        assert 4 in policy
        with pytest.raises(PoolExhausted):
            policy.evict(3)
        assert sorted(policy.evict(2)) == [1, 3]
        assert list(policy) == []
        policy.unpin([2])
        policy.unpin([4, 5])
        assert sorted(policy.evict(3)) == [2, 4, 5]

    def test_what_is_pinned_may_be_touched_and_removed(self) -> None:
        """It is pinned no more when it comes back."""
        policy = self.make_policy()
        policy.insert([1, 2], pinned=True)
        policy.touch([1, 2])
        assert list(policy) == []
        policy.remove([1])
        assert 1 not in policy
        policy.insert([1])
        assert policy.evict(1) == [1]

    def test_the_tail_of_a_chain_that_was_pinned_goes_before_its_root(self) -> None:
        """As of one that was not."""
        policy = self.make_policy()
        policy.insert([1, 2, 3], pinned=True)
        policy.unpin([1, 2, 3])
        assert policy.evict(3) == [3, 2, 1]

    def test_removed_keys_are_gone(self) -> None:
        """Given twice or not."""
        policy = self.filled([1, 2, 3, 4])
        policy.remove([2, 3, 2])
        assert policy.evict(2) == [4, 1]

    @pytest.mark.parametrize(
        ("call", "error"),
        [
            (lambda policy: policy.insert([9, 1]), AlreadyExists),
            (lambda policy: policy.insert([9, 9]), AlreadyExists),
            (lambda policy: policy.touch([1, 9]), NotFound),
            (lambda policy: policy.remove([1, 9]), NotFound),
            (lambda policy: policy.pin([1, 9]), NotFound),
            (lambda policy: policy.pin([1, 1]), Conflict),
            (lambda policy: policy.pin([1, 4]), Conflict),
            (lambda policy: policy.unpin([4, 9]), NotFound),
            (lambda policy: policy.unpin([4, 4]), Conflict),
            (lambda policy: policy.unpin([4, 1]), Conflict),
            (lambda policy: policy.insert([9, 4], pinned=True), AlreadyExists),
        ],
    )
    def test_wrong_keys_are_refused_before_anything_changes(
        self, call: Callable[[Policy[int]], None], error: type[KvistError]
    ) -> None:
        """Typed errors."""
        policy, same = self.filled([1, 2], [3]), self.filled([1, 2], [3])
        for each in (policy, same):
            each.insert([4], pinned=True)
        with pytest.raises(error):
            call(policy)
        assert len(policy) == 4
        for each in (policy, same):
            each.unpin([4])
        assert list(policy) == list(same)

    @settings(deadline=None, suppress_health_check=[HealthCheck.differing_executors])  # one for each subclass
    @given(chains=st.lists(_chain, max_size=20), capacity=st.integers(1, 8))
    def test_a_request_is_served_as_by_single_calls(self, chains: list[list[int]], capacity: int) -> None:
        """The same keys are there, the same go, and in the same order; a faster body has to prove it here."""
        policy, same = self.make_policy(), self.make_policy()
        for chain in chains:
            assert policy.serve(chain, capacity) == Policy.serve(same, chain, capacity)
            assert list(policy) == list(same)
            assert len(policy) == len(same) <= capacity

    def test_a_request_is_served_only_alone(self) -> None:
        """Refused before anything changes: with a key pinned, with a key twice, without a pool."""
        policy = self.filled([1, 2])
        before = list(policy)
        for keys, capacity, error in (([3, 3], 8, Conflict), ([3], 0, InvalidInput)):
            with pytest.raises(error):
                policy.serve(keys, capacity)
        assert list(policy) == before
        policy.pin([1])
        with pytest.raises(Conflict):
            policy.serve([3], 8)
        assert list(policy) == [2]

    @settings(deadline=None, suppress_health_check=[HealthCheck.differing_executors])  # one for each subclass
    @given(calls=_calls)
    def test_any_calls_keep_it_whole(self, calls: list[tuple[Any, ...]]) -> None:
        """Its keys are those of a plain model; what raises changes nothing; a second policy does the same."""
        policy, twin = self.make_policy(), self.make_policy()
        model: dict[int, bool] = {}  # the keys that are held, and whether they are pinned
        for name, *arguments in calls:
            before = list(policy)
            expected = self._error(model, name, *arguments)
            results = []
            for each in (policy, twin):
                try:
                    results.append(_call(each, name, *arguments))
                except KvistError as error:
                    assert type(error) is expected
                    assert list(each) == before
                else:
                    assert expected is None
            if expected is None:
                assert results[0] == results[1]
                if name == "evict":
                    n, protected = arguments
                    assert len(results[0]) == n
                    assert self.may_go({key for key in model if not model[key]}, protected).issuperset(results[0])
                    if not protected:
                        assert results[0] == before[:n]
                _change(model, name, results[0] if name == "evict" else arguments[0])
            unpinned = [key for key in model if not model[key]]
            assert sorted(policy) == sorted(unpinned)
            assert len(policy) == len(model)
            assert all((key in policy) is (key in model) for key in range(13))
            assert list(policy) == list(twin)
        order = list(policy)
        assert twin.evict(len(order)) == order

    def _error(self, model: dict[int, bool], name: str, *arguments: Any) -> type[KvistError] | None:
        """What this call must raise."""
        if name == "evict":
            n, protected = arguments
            unpinned = {key for key in model if not model[key]}
            return PoolExhausted if n > len(self.may_go(unpinned, protected)) else None
        (keys,) = arguments
        twice = len(set(keys)) < len(keys)
        if name == "expect":
            return None
        if name.startswith("insert"):
            return AlreadyExists if twice or not model.keys().isdisjoint(keys) else None
        if not model.keys() >= set(keys):
            return NotFound
        if name in ("pin", "unpin") and (twice or any(model[key] is (name == "pin") for key in keys)):
            return Conflict
        return None


def _call(policy: Policy[int], name: str, *arguments: Any) -> Any:
    if name == "insert pinned":
        return policy.insert(*arguments, pinned=True)
    return getattr(policy, name)(*arguments)


def _change(model: dict[int, bool], name: str, keys: list[int]) -> None:
    if name in ("remove", "evict"):
        for key in set(keys):
            del model[key]
    elif name not in ("touch", "expect"):
        model.update(dict.fromkeys(keys, name in ("insert pinned", "pin")))
