"""Each policy's own order, in examples small enough to follow by hand. `Lineage` and `Lru` have files of their own."""

from __future__ import annotations

from kvist.blocks.policy import Arc, Belady, Fifo, Lfu, MultiLru, Policy, S3Fifo, Sieve


def inserted(policy: Policy[int], *keys: int) -> Policy[int]:
    """One key after the other."""
    for key in keys:
        policy.insert([key])
    return policy


def used(policy: Policy[int], *keys: int) -> None:
    for key in keys:
        policy.touch([key])


def test_fifo_cares_for_no_use() -> None:
    policy = inserted(Fifo(), 1, 2, 3)
    used(policy, 1, 1, 2)
    assert list(policy) == [1, 2, 3]


def test_fifo_keeps_the_place_of_what_was_pinned() -> None:
    policy = inserted(Fifo(), 1)
    policy.insert([2], pinned=True)
    inserted(policy, 3)
    policy.pin([1])
    assert list(policy) == [3]
    policy.unpin([2])
    policy.unpin([1])
    assert list(policy) == [1, 2, 3]


def test_fifo_takes_what_comes_back_for_new() -> None:
    policy = inserted(Fifo(), 1, 2)
    assert policy.evict(1) == [1]
    assert list(inserted(policy, 1)) == [2, 1]


def test_lfu_counts_inserts_touches_and_pins() -> None:
    policy = inserted(Lfu(), 1, 2, 3)
    used(policy, 1, 1)
    policy.pin([2])
    assert list(policy) == [3, 1]
    policy.touch([2])
    policy.touch([2])
    policy.unpin([2])
    assert list(policy) == [3, 1, 2]


def test_lfu_lets_go_first_what_has_been_so_seldom_used_the_longest() -> None:
    policy = inserted(Lfu(), 1, 2, 3)
    used(policy, 2, 1)
    assert list(policy) == [3, 2, 1]


def test_lfu_forgets_the_uses_of_what_went() -> None:
    policy = inserted(Lfu(), 1, 2)
    used(policy, 1, 1, 2)
    assert policy.evict(1, {2}) == [1]
    assert list(inserted(policy, 1)) == [1, 2]


def test_a_long_life_leaves_no_old_ranks_behind() -> None:
    policy = inserted(Lfu(), *range(10))
    for turn in range(1000):
        used(policy, turn % 10)
    used(policy, 3, 3, 7)
    policy.pin([0])
    assert list(policy) == [1, 2, 4, 5, 6, 8, 9, 7, 3]
    assert policy.evict(9) == [1, 2, 4, 5, 6, 8, 9, 7, 3]


def test_sieve_spares_what_was_used_and_leaves_it_in_its_place() -> None:
    """The hand goes from the oldest on, over what was used, and waits behind what it evicted."""
    policy = inserted(Sieve(), 1, 2, 3, 4)
    used(policy, 1, 3)
    assert policy.evict(1) == [2]
    inserted(policy, 5)
    assert list(policy) == [4, 5, 1, 3]
    assert policy.evict(2) == [4, 5]
    assert policy.evict(1) == [1]


def test_sieve_takes_for_used_what_must_stay() -> None:
    policy = inserted(Sieve(), 1, 2, 3)
    policy.pin([1])
    assert policy.evict(1, {2}) == [3]
    policy.unpin([1])
    assert list(policy) == [1, 2]


def test_sieve_goes_on_where_its_next_key_was_removed() -> None:
    policy = inserted(Sieve(), 1, 2, 3, 4)
    used(policy, 1)
    assert policy.evict(1) == [2]
    policy.remove([3])
    assert list(policy) == [4, 1]
    policy.remove([4])
    assert list(inserted(policy, 5)) == [1, 5]


def test_s3fifo_lets_go_soon_what_was_not_used_twice() -> None:
    """100 and 101 fill the small queue, 1 to 18 the main one. 100 moves on; 101 was used once again only."""
    policy = inserted(S3Fifo(20), 100, 101, *range(1, 19))
    used(policy, 100, 100, 101)
    assert policy.evict(1) == [101]
    assert policy.evict(1) == [1]  # the main queue has 19 now, one too many
    inserted(policy, 102)
    assert list(policy) == [102, *range(2, 19), 100]


def test_s3fifo_remembers_what_left_the_small_queue() -> None:
    policy = inserted(S3Fifo(20), 100, 101, *range(1, 19))
    assert policy.evict(1) == [100]
    inserted(policy, 100)
    assert policy.evict(1) == [1]  # 100 came to the main queue, that is too long now
    assert list(policy) == [101, *range(2, 19), 100]


def test_s3fifo_lets_a_key_of_the_main_queue_round_for_each_use_three_at_most() -> None:
    policy = S3Fifo(10)
    inserted(policy, 0, 1, 2, 3)
    used(policy, 1, 1, 1, 1, 1, 2, 3, 3)
    assert list(policy) == [0, 2, 3, 1]


def test_s3fifo_finds_a_key_of_the_main_queue_when_all_were_used() -> None:
    policy = inserted(S3Fifo(20), 100, 101, *range(1, 19))
    used(policy, 100, 100, *range(1, 19))
    assert policy.evict(1) == [101]
    inserted(policy, 102)
    used(policy, 100)
    assert policy.evict(1) == [1]


def test_s3fifo_takes_for_used_what_must_stay() -> None:
    policy = inserted(S3Fifo(20), 100, 101, 1, 2)
    policy.pin([100])
    assert policy.evict(1, {101}) == [1]
    policy.unpin([100])
    assert list(policy) == [2, 100, 101]


def test_arc_evicts_what_was_used_once_before_what_was_used_twice() -> None:
    policy = inserted(Arc(4), 1, 2, 3, 4)
    used(policy, 1)
    assert list(policy) == [2, 3, 4, 1]


def test_arc_moves_its_target_by_what_comes_back() -> None:
    """With one ghost of each kind, by one. At the target the keys used often go, but if one of theirs comes back."""
    policy = inserted(Arc(4), 1, 2, 3, 4)
    used(policy, 1, 2)
    assert policy.evict(1) == [3]
    policy.expect([3])  # the target is one: 4, alone, is not too many
    assert list(policy) == [1, 2, 4]
    assert policy.evict(1) == [1]
    inserted(policy, 3)
    policy.expect([1])  # the target is nought again
    assert list(policy) == [4, 2, 3]


def test_arc_remembers_what_it_expects_until_it_comes() -> None:
    """A pool may be asked in vain, and expect the same, or others, once more."""

    def after(*expected: list[int]) -> tuple[list[int], float]:
        policy = inserted(Arc(2), 1, 2)
        policy.touch([2])
        assert policy.evict(1) == [1]
        policy.insert([3])
        for keys in expected:
            policy.expect(keys)
        policy.evict(1)
        for key in (1, 4, 5):
            policy.insert([key])
        return list(policy), policy._target

    assert after([1]) == after([1], [9], [1]) == after([1], [1]) == ([3, 4, 1, 5], 1)


def test_arc_learns_one_eviction_later_without_a_word() -> None:
    policy = inserted(Arc(4), 1, 2, 3, 4)
    used(policy, 1, 2)
    assert policy.evict(2) == [3, 4]
    inserted(policy, 3, 4)
    assert list(policy) == [1, 2, 3, 4]
    inserted(policy, 5)
    assert list(policy) == [1, 2, 3, 4, 5]


def test_multi_lru_lets_go_the_coldest() -> None:
    """Warm from 3 uses on, hot from 8, very hot from 15; what is as hot goes by its last use."""
    policy = MultiLru(1000)
    for uses in range(15, 0, -1):
        inserted(policy, uses)
        used(policy, *[uses] * (uses - 1))
    assert list(policy) == [2, 1, 7, 6, 5, 4, 3, 14, 13, 12, 11, 10, 9, 8, 15]


def test_multi_lru_remembers_the_uses_of_what_went() -> None:
    policy = inserted(MultiLru(1000), 1, 2)
    used(policy, 1, 1)
    policy.remove([1])
    assert list(inserted(policy, 1, 3)) == [2, 3, 1]


def test_multi_lru_counts_a_use_for_a_pin_and_none_for_its_end() -> None:
    policy = inserted(MultiLru(1000), 1, 2)
    for _ in range(2):
        policy.pin([1])
        policy.unpin([1])
    assert list(inserted(policy, 3)) == [2, 3, 1]


def test_belady_lets_go_what_is_needed_last_or_never() -> None:
    policy = Belady([1, 2, 3, 4, 2, 1, 3])
    inserted(policy, 1, 2, 3, 4)
    assert list(policy) == [4, 3, 1, 2]
    used(policy, 2)
    assert list(policy) == [4, 2, 3, 1]


def test_belady_follows_what_is_pinned() -> None:
    policy = Belady([1, 2, 1, 2, 1])
    policy.insert([1, 2], pinned=True)
    policy.touch([1])
    policy.unpin([1, 2])
    assert list(policy) == [1, 2]
    policy.pin([2])
    policy.unpin([2])
    assert list(policy) == [2, 1]
