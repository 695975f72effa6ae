"""The least recently used goes first."""

from __future__ import annotations

from kvist.blocks.policy import Lru, Policy
from kvist.testing.policy import PolicyTests


class TestLru(PolicyTests):
    def make_policy(self) -> Policy[int]:
        return Lru()


def test_use_decides_the_order() -> None:
    policy: Lru[str] = Lru()
    policy.insert(["a", "b", "c"])
    policy.insert(["d"])
    policy.touch(["a", "b"])
    assert list(policy) == ["c", "d", "b", "a"]
    assert policy.evict(2, {"c"}) == ["d", "b"]
    assert list(policy) == ["c", "a"]


def test_what_is_protected_keeps_its_place() -> None:
    policy: Lru[int] = Lru()
    policy.insert([3, 2, 1])
    assert policy.evict(1, {1}) == [2]
    policy.insert([4])
    assert list(policy) == [1, 3, 4]
