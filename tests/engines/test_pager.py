"""`HfPager`: the conformance suite, and bit-exact moves between engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvist.engines.hf import Engine, HfPager
from kvist.errors import Conflict, InvalidInput, NotFound, PoolExhausted
from kvist.pager import CachePager, LogicalSeq
from kvist.testing.pager import PagerTests

from .driving import carry, page_bytes, params, prompt, run, trace

Load = Callable[..., Engine]
HOT = {"temperature": 0.8, "seed": 9, "top_p": 0.9}


class TestHfPager(PagerTests):
    """The published suite."""

    @pytest.fixture(autouse=True)
    def _use(self, load: Load) -> None:
        self.load = load

    def make_pager(self) -> CachePager:
        self.engine = engine = self.load()
        run(engine, prompt(40), 3, sequence_id="one")
        run(engine, prompt(33) + prompt(9, seed=1), 2, sequence_id="two", **HOT)
        run(engine, prompt(16, seed=2), 1, sequence_id="gone")
        engine.drop("gone")
        return HfPager(engine)

    def make_empty(self) -> CachePager:
        self.engine = self.load()
        return HfPager(self.engine)

    def second_pager(self, pager: CachePager) -> CachePager:
        return HfPager(self.engine)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("sampling", [{}, HOT])
def test_moved_sequences_go_on_bit_for_bit(length: int, sampling: dict[str, Any], load: Load) -> None:
    """Into a busy engine, at other slots; by name and by prompt; cut after 7 tokens."""
    source, target = load(), load()
    expected = run(source, prompt(length), 24, **sampling)
    first = run(source, prompt(length), 7, sequence_id="moved", **sampling)
    busy = [target.submit(prompt(20, seed=n + 1), params(16)) for n in range(3)]
    carry(source, target, "moved")
    assert first + run(target, [], 17, resume="moved") == expected
    assert page_bytes(target, "moved") == page_bytes(source, "moved")
    if not sampling:
        request = target.submit(prompt(length) + first.tokens, params(17))
        assert first + trace(request.result()) == expected
        assert request.cached_tokens == length + 6
    assert all(len(request.result()) == 16 for request in busy)


@pytest.mark.parametrize(("family", "dtype"), [("gemma3", "bf16"), ("gpt2", "f16")])
def test_other_models_move_too(family: str, dtype: str, load: Load) -> None:
    source, target = load(family, dtype=dtype), load(family, dtype=dtype)
    expected = run(source, prompt(30), 20)
    first = run(source, prompt(30), 7, sequence_id="moved")
    run(target, prompt(20, seed=1), 4)
    carry(source, target, "moved")
    assert first + run(target, [], 13, resume="moved") == expected


def test_a_sequence_caught_in_mid_run_goes_on_elsewhere(load: Load) -> None:
    """After every step: in the middle of its prompt, at its end, and between two tokens."""
    expected = run(load(), prompt(40), 10, **HOT)
    source, target, captured = load(), load(pages=128), 0
    request = source.submit(prompt(40), params(10, **HOT), sequence_id="moved")
    while request.finish_reason is None:
        source.pause()
        if any(info.status == "running" for info in source.sequences()):
            carry(source, target, "moved", rename=f"at-{captured}")
            captured += 1
        source.resume()
    assert captured >= 6
    for n in range(captured):
        (info,) = [info for info in target.sequences() if info.id == f"at-{n}"]
        done = info.tokens - 40
        resumed = run(target, [], 10 - done, resume=f"at-{n}")
        assert resumed.tokens == expected.tokens[done:]
        assert expected.logits.endswith(resumed.logits)


@pytest.mark.parametrize("page", [0, 1, 2])
@pytest.mark.parametrize("half", [0, 1])
def test_one_flipped_bit_shows(page: int, half: int, load: Load) -> None:
    """In a full page and in the partly filled one, in K and in V: what attention reads is what was restored."""
    source = load()
    run(source, prompt(36), 5, sequence_id="moved")
    expected = run(source, [], 4, resume="moved")
    size = source.layout.page_bytes
    honest, damaged = load(), load()
    carry(source, honest, "moved")
    # Byte 3 of an f32 holds the high bits of its exponent; the first token of the page is row 0 of layer 0.
    carry(source, damaged, "moved", flip=(2 * page + half) * size + 3)
    assert run(honest, [], 4, resume="moved") == expected
    assert run(damaged, [], 4, resume="moved").logits != expected.logits


def test_rows_past_the_fill_do_not_matter(load: Load) -> None:
    source, target = load(), load()
    run(source, prompt(18), 1, sequence_id="moved")
    size = source.layout.page_bytes
    carry(source, target, "moved", flip=2 * size + size // 2 - 1)
    assert page_bytes(target, "moved") == page_bytes(source, "moved")


def test_pages_are_shared_by_block_and_pinned(load: Load) -> None:
    engine = load(pages=8)
    run(engine, prompt(40), 1, sequence_id="gone")
    engine.drop("gone")
    pager = HfPager(engine)
    cached = pager.occupied_pages()
    blocks = pager.page_blocks(cached)
    assert len(cached) == 2
    assert None not in blocks
    assert pager.share_pages([*blocks, None, "00" * 32]) == [*cached, None, None]
    rest = pager.allocate_pages(6)
    with pytest.raises(PoolExhausted):
        pager.allocate_pages(1)
    engine.check_integrity()
    pager.release_pages([*cached, *rest])
    assert pager.occupied_pages() == cached
    assert len(pager.allocate_pages(8)) == 8
    assert pager.occupied_pages() == []


def test_pages_without_a_sequence_stay_if_they_have_a_hash(load: Load) -> None:
    source, target = load(), load()
    run(source, prompt(40), 1, sequence_id="source")
    reader, writer = HfPager(source), HfPager(target)
    ixs = reader.logical_seqs()[0].page_ixs
    buffer = bytearray(3 * 2 * source.layout.page_bytes)
    reader.read_pages(ixs, memoryview(buffer))
    slots = writer.allocate_pages(3)
    writer.write_pages(slots, memoryview(buffer), reader.page_blocks(ixs))
    writer.install_logical_seqs([])
    assert writer.occupied_pages() == sorted(slots[:2])
    request = target.submit(prompt(40), params(1))
    assert trace(request.result()) == run(load(), prompt(40), 1)
    assert request.cached_tokens == 32


def test_a_view_of_some_sequences(load: Load) -> None:
    engine = load()
    for n in range(3):
        run(engine, prompt(20, seed=n), 1, sequence_id=f"s{n}")
    pager = HfPager(engine, ["s2", "s0"])
    assert [seq.id for seq in pager.logical_seqs()] == ["s0", "s2"]
    assert pager.occupied_pages() == sorted(ix for seq in pager.logical_seqs() for ix in seq.page_ixs)
    with pytest.raises(NotFound, match="nobody"):
        HfPager(engine, ["nobody"]).logical_seqs()


def test_finished_sequences_make_room_for_restored_ones(load: Load) -> None:
    engine = load(pages=6)
    run(engine, prompt(40), 1, sequence_id="old")
    running = engine.submit(prompt(20, seed=1), params(12), sequence_id="live")
    next(iter(running))
    pager = HfPager(engine)
    with pytest.raises(PoolExhausted):
        pager.allocate_pages(6)
    assert "old" in {info.id for info in engine.sequences()}, "nobody is evicted in vain"
    running.result()
    assert len(pager.allocate_pages(6)) == 6
    assert engine.sequences() == []


def test_what_cannot_be_installed_is_refused_whole(load: Load) -> None:
    engine = load()
    run(engine, prompt(20), 1, sequence_id="there")
    pager = HfPager(engine)
    (there,) = pager.logical_seqs()
    (slot, spare) = pager.allocate_pages(2)
    page = pager.read_page(there.page_ixs[0])
    good = LogicalSeq("good", (slot,), 0, there.token_ids)
    with pytest.raises(InvalidInput, match="did not allocate and write"):
        pager.install_logical_seqs([good])
    half = pager.meta().page_bytes
    block = pager.page_blocks([there.page_ixs[0]])
    pager.write_pages([slot], memoryview(bytes(page.k) + bytes(page.v)), block)
    wrong = {
        "fill": replace(good, id="bad", fill_in_last_page=16),
        "names a slot twice": replace(good, id="bad", page_ixs=(slot, slot), token_ids=()),
        "cached tokens": replace(good, id="bad", token_ids=(5, 6)),
        "token ids": replace(good, id="bad", token_ids=(900,) * 16),
        "did not allocate and write": replace(good, id="bad", page_ixs=(there.page_ixs[0],)),
        "its token ids make block": replace(good, id="bad", token_ids=tuple(prompt(16, seed=4))),
        "name": replace(good, id="-bad"),
    }
    for message, seq in wrong.items():
        with pytest.raises(InvalidInput, match=message):
            pager.install_logical_seqs([good, seq])
    for seq in (replace(good, id="there"), good):
        with pytest.raises(Conflict):
            pager.install_logical_seqs([good, seq])
    with pytest.raises(InvalidInput):
        pager.write_pages([spare], memoryview(bytes(2 * half)), ["zz"])
    with pytest.raises(InvalidInput):
        pager.write_pages([spare], memoryview(bytes(2 * half)), [])
    with pytest.raises(InvalidInput):
        pager.read_pages([slot], memoryview(bytearray(half)))
    assert [info.id for info in engine.sequences()] == ["there"]
    pager.install_logical_seqs([good])
    engine.check_integrity()
    assert {info.id for info in engine.sequences()} == {"there", "good"}


def test_a_sequence_without_ids_is_kept_but_cannot_go_on(load: Load) -> None:
    engine = load()
    pager = HfPager(engine)
    (slot,) = pager.allocate_pages(1)
    page_size = 2 * pager.meta().page_bytes
    pager.write_pages([slot], memoryview(bytes(page_size)), [None])
    pager.install_logical_seqs([LogicalSeq("opaque", (slot,), 3, (), {"other": 1})])
    (seq,) = pager.logical_seqs()
    assert (seq.id, seq.fill_in_last_page, seq.state) == ("opaque", 3, {"other": 1})
    with pytest.raises(InvalidInput, match="without token ids"):
        engine.submit([], resume="opaque")
