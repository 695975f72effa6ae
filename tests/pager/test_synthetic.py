"""The synthetic engine passes the suite that is shipped for real ones, and the original's own pager tests."""

from __future__ import annotations

import pytest

from kvist.errors import InvalidInput, PoolExhausted
from kvist.layout import Layout
from kvist.pager import CachePager, LogicalSeq, PageBytes, SyntheticCachePager
from kvist.testing.pager import PagerTests

SMALL = Layout(page_size_tokens=4, n_layers=2, n_heads=2, head_dim=4, dtype="bf16")


class TestSynthetic(PagerTests):
    def make_pager(self) -> CachePager:
        pager = SyntheticCachePager(SMALL, slots=64)
        pager.populate(4, seed=1)
        pager.populate(3, seed=2)
        return pager

    def make_empty(self) -> CachePager:
        return SyntheticCachePager(SMALL, slots=64)

    def second_pager(self, pager: CachePager) -> CachePager:
        assert isinstance(pager, SyntheticCachePager)
        return pager.clone()


def test_an_install_leaves_another_pagers_allocated_slots_alone() -> None:
    pager = SyntheticCachePager(SMALL)
    other = pager.clone()
    (ix,) = other.allocate_pages(1)
    page = PageBytes(bytes(SMALL.page_bytes), bytes(SMALL.page_bytes))
    other.write_page(ix, page)
    pager.populate(2, seed=1)
    pager.release_pages([ix])
    other.install_logical_seqs([LogicalSeq("late", (ix,))])
    assert other.read_page(ix) == page


def test_populate_then_read_is_deterministic() -> None:
    pager = SyntheticCachePager(SMALL)
    pager.populate(8, seed=42)
    assert pager.occupied_pages() == list(range(8))
    assert pager.read_page(0) == pager.read_page(0)


def test_seeds_decide_the_bytes() -> None:
    a, b, c = (SyntheticCachePager(SMALL) for _ in range(3))
    a.populate(4, seed=7)
    b.populate(4, seed=7)
    c.populate(4, seed=9)
    assert [a.read_page(ix) for ix in range(4)] == [b.read_page(ix) for ix in range(4)]
    assert a.read_page(0) != c.read_page(0)


def test_allocation_counts_upwards_and_never_reuses() -> None:
    pager = SyntheticCachePager(SMALL)
    assert pager.allocate_pages(3) == [0, 1, 2]
    pager.release_pages([0, 1, 2])
    assert pager.allocate_pages(2) == [3, 4]


def test_wrong_lengths_are_refused() -> None:
    pager = SyntheticCachePager(SMALL)
    (ix,) = pager.allocate_pages(1)
    with pytest.raises(InvalidInput, match="expected 128 each"):
        pager.write_page(ix, PageBytes(bytes(1), bytes(1)))


def test_a_full_pool_says_how_many_slots_are_free() -> None:
    pager = SyntheticCachePager(SMALL, slots=4)
    pager.populate(3, seed=1)
    with pytest.raises(PoolExhausted, match="1 of 4 are free"):
        pager.allocate_pages(2)
