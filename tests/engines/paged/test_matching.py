"""What a request may take: chains of blocks, sequences, windows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvist.engines.paged.matching import Checkout, Stored, chain_tokens, first_block, starts_with

SIZE = 4


def hashes(count: int) -> list[bytes]:
    return [bytes([n]) for n in range(count)]


def chain(held: list[set[int]], windows: list[int | None], *, blocks: int = 10, limit: int = 1000) -> int:
    return chain_tokens(hashes(blocks), limit, SIZE, windows, lambda group, name: name[0] in held[group])


def test_full_attention_needs_every_block_from_the_start() -> None:
    assert chain([{0, 1, 2, 4}], [None]) == 12
    assert chain([{1, 2}], [None]) == 0
    assert chain([set()], [None]) == 0


def test_the_limit_is_rounded_down_to_whole_blocks() -> None:
    assert chain([set(range(10))], [None], limit=11) == 8
    assert chain([set(range(10))], [None], limit=3) == 0


def test_a_window_needs_only_what_the_next_token_looks_back_on() -> None:
    # after 16 tokens a window of 5 holds tokens 12 to 16: block 3 alone
    assert chain([{0, 1, 2, 3}, {3}], [None, 5]) == 16
    # one of 6 also holds token 11
    assert chain([{0, 1, 2, 3}, {3}], [None, 6]) == 0
    assert chain([{0, 1, 2, 3}, {2, 3}], [None, 6]) == 16


def test_groups_agree_on_the_longest_chain_that_all_can_go_on_from() -> None:
    assert chain([set(range(8)), {0, 1, 5}], [None, 5]) == 24
    assert chain([set(range(5)), {0, 1, 5}], [None, 5]) == 8


@given(
    held=st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=3),
    windows=st.lists(st.none() | st.integers(1, 20), min_size=3, max_size=3),
    limit=st.integers(0, 40),
)
def test_the_chain_is_the_longest_by_trying_them_all(
    held: list[set[int]], windows: list[int | None], limit: int
) -> None:
    windows = windows[: len(held)]

    def serves(blocks: int) -> bool:
        return all(
            number in have
            for have, window in zip(held, windows, strict=True)
            for number in range(first_block(blocks * SIZE, window, SIZE), blocks)
        )

    best = max(n for n in range(min(8, limit // SIZE) + 1) if serves(n))
    assert chain(held, windows, blocks=8, limit=limit) == best * SIZE


def stored(name: str, tokens: list[int], cached: int) -> Stored:
    return Stored(name, tokens, cached, [[0] * -(-cached // SIZE)])


def checkout(*sequences: Stored) -> Checkout:
    return Checkout("content", [{}], sequences, [None], SIZE)


def test_the_longest_sequence_that_begins_the_request_is_found() -> None:
    long, short = stored("long", list(range(20)), 19), stored("short", list(range(6)), 5)
    other = stored("other", [9, 9, 9, 9, 9], 4)
    found = checkout(short, long, other)
    assert found.longest(list(range(20))) is long
    assert found.longest(list(range(19))) is short  # one token must be left to compute
    assert found.longest([*range(6), 77]) is short
    assert found.longest([9, 9, 9, 9, 1]) is other
    assert found.longest([9, 9, 9, 9]) is None
    assert found.longest([1, 2, 3]) is None


def test_a_sequence_shorter_than_a_block_is_found() -> None:
    one = stored("one", [5, 6], 1)
    assert checkout(one).longest([5, 9, 9, 9, 9, 9]) is one
    assert checkout(one).longest([6, 5]) is None


def test_a_sequence_without_pages_matches_nothing() -> None:
    assert checkout(stored("waiting", [1, 2, 3], 0)).longest([1, 2, 3, 4]) is None


def test_only_cached_tokens_must_agree() -> None:
    assert starts_with([1, 2, 3, 50], stored("s", [1, 2, 3, 4], 3))
    assert not starts_with([1, 2, 7, 4], stored("s", [1, 2, 3, 4], 3))
    assert not starts_with([1, 2, 3], stored("s", [1, 2, 3, 4], 3))
