"""`PagerTests`: the conformance suite of `kvist.pager.CachePager`. Run it on your own engine's pager.

Subclass it, and say how to make an engine that holds something:

    class TestMyPager(PagerTests):
        def make_pager(self) -> CachePager: ...      # an engine with at least two sequences and four pages
        def make_empty(self) -> CachePager: ...      # the same layout, no sequence, room for all of the above
        def second_pager(self, pager): ...           # optional: another pager on the same engine
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Final

import pytest

from kvist.errors import Conflict, InvalidInput, LayoutMismatch, NotFound, PoolExhausted
from kvist.pager import Arena, CachePager, LogicalSeq, PageBytes, capture, restore
from kvist.repo import Repository
from kvist.store import MemoryStore

ROOM_MAX: Final = 4096
"""Slots above which an engine's free ones are not counted."""


def contents(pager: CachePager) -> dict[str, tuple[list[bytes], int, tuple[int, ...]]]:
    """What each sequence holds, wherever its pages lie: page bytes in order, fill, token ids."""
    pager.pause()
    try:
        return {
            seq.id: (
                [bytes(page.k) + bytes(page.v) for page in map(pager.read_page, seq.page_ixs)],
                seq.fill_in_last_page,
                seq.token_ids,
            )
            for seq in pager.logical_seqs()
        }
    finally:
        pager.resume()


def room(pager: CachePager) -> int:
    """How many slots can be had, found by taking them all and giving them back; at most `ROOM_MAX`.

    For an engine without sequences: another may evict some to make room.
    """
    taken: list[int] = []
    with contextlib.suppress(PoolExhausted):
        while len(taken) < ROOM_MAX:
            taken += pager.allocate_pages(1)
    pager.release_pages(taken)
    return len(taken)


class PagerTests(ABC):
    """What every `CachePager` must do."""

    @abstractmethod
    def make_pager(self) -> CachePager:
        """A pager on an engine with at least two sequences over at least four pages."""

    @abstractmethod
    def make_empty(self) -> CachePager:
        """A pager on an engine of the same layout without sequences, with room for those of `make_pager`."""

    def second_pager(self, pager: CachePager) -> CachePager | None:
        """Another pager on the engine of ``pager``, for use in another thread; ``None`` skips what needs one."""
        return None

    @pytest.fixture
    def pager(self) -> CachePager:
        """See `make_pager`."""
        return self.make_pager()

    @pytest.fixture
    def empty(self) -> CachePager:
        """See `make_empty`."""
        return self.make_empty()

    @pytest.fixture
    def repo(self) -> Repository:
        """A repository in memory."""
        return Repository.init(MemoryStore())

    def test_the_layout_is_constant_and_equal(self, pager: CachePager, empty: CachePager) -> None:
        """Two engines of one make have one layout."""
        assert pager.meta() == pager.meta() == empty.meta()
        assert pager.numerics() == empty.numerics()

    def test_pages_of_sequences_are_occupied(self, pager: CachePager) -> None:
        """Tables are consistent, and in range."""
        seqs = pager.logical_seqs()
        occupied = pager.occupied_pages()
        assert len(seqs) >= 2
        assert len(occupied) >= 4
        assert occupied == sorted(set(occupied))
        for seq in seqs:
            assert set(seq.page_ixs) <= set(occupied)
            assert 0 <= seq.fill_in_last_page < pager.meta().page_size_tokens
            assert not seq.token_ids or len(seq.token_ids) >= seq.cached_tokens(pager.meta().page_size_tokens)

    def test_an_empty_engine_has_no_pages(self, empty: CachePager) -> None:
        """Zero case."""
        assert empty.occupied_pages() == []
        assert empty.logical_seqs() == []

    def test_reading_is_repeatable_and_has_the_size(self, pager: CachePager) -> None:
        """A page is two halves of `page_bytes`."""
        half = pager.meta().page_bytes
        for ix in pager.occupied_pages():
            first, again = pager.read_page(ix), pager.read_page(ix)
            assert (bytes(first.k), bytes(first.v)) == (bytes(again.k), bytes(again.v))
            assert len(first.k) == len(first.v) == half

    def test_bulk_reads_equal_single_reads(self, pager: CachePager) -> None:
        """In any order, also twice, also none."""
        ixs = pager.occupied_pages()[::-1]
        ixs = [*ixs, ixs[0]]
        out = bytearray(len(ixs) * 2 * pager.meta().page_bytes)
        pager.read_pages(ixs, memoryview(out))
        pages = [pager.read_page(ix) for ix in ixs]
        assert bytes(out) == b"".join(bytes(page.k) + bytes(page.v) for page in pages)
        pager.read_pages([], memoryview(bytearray()))

    def test_reading_an_unknown_slot_is_refused(self, empty: CachePager) -> None:
        """Typed, not garbage."""
        with pytest.raises(InvalidInput):
            empty.read_page(0)

    def test_block_hashes_name_full_pages(self, pager: CachePager) -> None:
        """Equal hashes mean equal bytes."""
        ixs = pager.occupied_pages()
        blocks = pager.page_blocks(ixs)
        assert len(blocks) == len(ixs)
        seen: dict[str, bytes] = {}
        for ix, block in zip(ixs, blocks, strict=True):
            if block is not None:
                assert bytes.fromhex(block)
                page = pager.read_page(ix)
                assert seen.setdefault(block, bytes(page.k) + bytes(page.v)) == bytes(page.k) + bytes(page.v)

    def test_allocation_gives_distinct_free_slots(self, pager: CachePager) -> None:
        """And release gives them back."""
        first, second = pager.allocate_pages(1), pager.allocate_pages(1)
        assert len({*first, *second}) == 2
        assert not {*first, *second} & {ix for seq in pager.logical_seqs() for ix in seq.page_ixs}
        pager.release_pages([*first, *second])
        assert pager.allocate_pages(0) == []

    def test_slots_given_back_can_be_had_again(self, empty: CachePager) -> None:
        """All of them, however often."""
        assert len({room(empty) for _ in range(3)}) == 1
        assert empty.occupied_pages() == []

    def test_allocation_is_all_or_nothing(self, pager: CachePager) -> None:
        """Too much is refused, and what was there stays."""
        before = contents(pager)
        with pytest.raises(PoolExhausted):
            pager.allocate_pages(10**7)
        assert contents(pager) == before
        pager.release_pages(pager.allocate_pages(1))

    def test_write_refuses_a_wrong_length(self, empty: CachePager) -> None:
        """Neither half may be short or long."""
        half = empty.meta().page_bytes
        (ix,) = empty.allocate_pages(1)
        for k, v in ((b"", bytes(half)), (bytes(half), bytes(half - 1)), (bytes(half + 1), bytes(half))):
            with pytest.raises(InvalidInput):
                empty.write_page(ix, PageBytes(k, v))
        empty.release_pages([ix])

    def test_write_refuses_a_slot_in_use(self, pager: CachePager) -> None:
        """A page of a live sequence is never overwritten."""
        before = contents(pager)
        half = pager.meta().page_bytes
        with pytest.raises(InvalidInput):
            pager.write_page(pager.logical_seqs()[0].page_ixs[0], PageBytes(bytes(half), bytes(half)))
        assert contents(pager) == before

    def test_install_adds_beside_what_is_there(self, pager: CachePager) -> None:
        """A restore into a busy engine disturbs nobody."""
        before = contents(pager)
        source = pager.logical_seqs()[0]
        pages = [pager.read_page(ix) for ix in source.page_ixs]
        ixs = pager.allocate_pages(len(pages))
        for ix, page in zip(ixs, pages, strict=True):
            pager.write_page(ix, page)
        pager.install_logical_seqs(
            [LogicalSeq("installed", tuple(ixs), source.fill_in_last_page, source.token_ids, source.state)]
        )
        after = contents(pager)
        assert after.pop("installed") == before[source.id]
        assert after == before

    def test_install_refuses_a_taken_id(self, pager: CachePager) -> None:
        """All or nothing."""
        before = contents(pager)
        taken = pager.logical_seqs()[0]
        with pytest.raises(Conflict):
            pager.install_logical_seqs([LogicalSeq("fresh", ()), taken])
        assert contents(pager) == before

    def test_install_refuses_one_id_for_two(self, pager: CachePager) -> None:
        """In one call, too."""
        before = contents(pager)
        with pytest.raises(Conflict):
            pager.install_logical_seqs([LogicalSeq("twice", ()), LogicalSeq("twice", ())])
        assert contents(pager) == before

    def test_pauses_nest(self, pager: CachePager) -> None:
        """The tables can be read inside."""
        pager.pause()
        pager.pause()
        pager.resume()
        assert pager.logical_seqs()
        pager.resume()

    def test_a_pause_keeps_other_pagers_out_until_its_last_resume(self, pager: CachePager) -> None:
        """Two pauses need two resumes."""
        other = self.second_pager(pager)
        if other is None:
            pytest.skip("no second pager on this engine")
        entered = threading.Event()

        def enter() -> None:
            other.pause()
            entered.set()
            other.resume()

        thread = threading.Thread(target=enter, daemon=True)
        pager.pause()
        pager.pause()
        try:
            thread.start()
            assert not entered.wait(0.1)
        finally:
            pager.resume()
        try:
            assert not entered.wait(0.1)
        finally:
            pager.resume()
        assert entered.wait(60)
        thread.join()

    @pytest.mark.parametrize("arena", [None, Arena()])
    def test_capture_then_restore_is_bit_exact(
        self, pager: CachePager, empty: CachePager, repo: Repository, arena: Arena | None
    ) -> None:
        """The round trip: same bytes, tables and ids in another engine."""
        before = contents(pager)
        captured = capture(pager, repo, branch="main", arena=arena)
        assert captured.pages == len(pager.occupied_pages())
        restored = restore(empty, repo, "main", arena=arena)
        assert contents(empty) == before == contents(pager)
        assert sorted(restored.sequences) == sorted(before)
        assert restored.same_numerics
        assert restored.tokens == captured.snapshot.tokens

    def test_restore_into_the_busy_source(self, pager: CachePager, repo: Repository) -> None:
        """Beside the originals, under other names."""
        before = contents(pager)
        capture(pager, repo, branch="main")
        restore(pager, repo, "main", rename=lambda name: f"again/{name}")
        after = contents(pager)
        assert {name: after[name] for name in before} == before
        assert {name: after[f"again/{name}"] for name in before} == before

    def test_one_sequence_alone(self, pager: CachePager, empty: CachePager, repo: Repository) -> None:
        """Captured, its pages only; restored, it only."""
        before = contents(pager)
        name = pager.logical_seqs()[0].id
        captured = capture(pager, repo, sequences=[name], branch="one")
        assert captured.pages == len(before[name][0])
        restore(empty, repo, "one", sequences=[name])
        assert contents(empty) == {name: before[name]}

    def test_unknown_sequences_are_refused(self, pager: CachePager, empty: CachePager, repo: Repository) -> None:
        """On both ways."""
        with pytest.raises(NotFound):
            capture(pager, repo, sequences=["nobody"])
        capture(pager, repo, branch="main")
        with pytest.raises(NotFound):
            restore(empty, repo, "main", sequences=["nobody"])
        assert contents(empty) == {}

    def test_a_failed_restore_changes_nothing(self, pager: CachePager, repo: Repository) -> None:
        """An id is taken, or given twice: no slot is lost, no sequence touched."""
        before, occupied = contents(pager), pager.occupied_pages()
        capture(pager, repo, branch="main")
        with pytest.raises(Conflict):
            restore(pager, repo, "main")
        with pytest.raises(Conflict):
            restore(pager, repo, "main", rename=lambda _: "same")
        assert contents(pager) == before
        assert pager.occupied_pages() == occupied

    def test_failed_restores_leak_nothing(self, pager: CachePager, empty: CachePager, repo: Repository) -> None:
        """However many they are, every slot that could be had before can be had after."""
        free = room(empty)
        capture(pager, repo, branch="main")
        for _ in range(3):
            with pytest.raises(Conflict):
                restore(empty, repo, "main", rename=lambda _: "same")
        assert room(empty) == free
        restore(empty, repo, "main")
        assert contents(empty) == contents(pager)

    def test_another_layout_is_refused(self, pager: CachePager, empty: CachePager, repo: Repository) -> None:
        """The two values side by side."""
        capture(pager, repo, branch="main")
        other = replace(empty.meta(), revision="another revision")
        empty.meta = lambda: other  # type: ignore[method-assign]
        with pytest.raises(LayoutMismatch, match="another revision"):
            restore(empty, repo, "main")
        assert contents(empty) == {}
