"""The HiCache backend: what is read is what was written, whatever else happens: kills, damage, bounds, a lost store."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import hicache_pools as pools
import pytest
import torch
from hicache_pools import DIM, HEADS, LAYERS, LAYOUTS, Open, canonical, fill, mha, mla, read, slots

from kvist.engines.sglang.hicache_pages import HostPages, views
from kvist.errors import KvistError, StoreError
from kvist.pager.prefix import PrefixCache
from kvist.repo.refs import RefKind
from kvist.repo.repository import Repository

pytest_plugins = ("hicache_fixtures",)
EVERY = [(mha, layout) for layout in LAYOUTS] + [(mla, layout) for layout in LAYOUTS if layout != "page_head"]
PAGE_BYTES = 2 * LAYERS * 4 * HEADS * DIM * 2  # of `mha()`: 4 tokens, bfloat16


# -- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "layout"), EVERY)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages_of_the_host_pool(open_backend: Open, make: Any, layout: str, page_size: int) -> None:
    pool = make(layout, page_size)
    one = open_backend(pool)
    wrote = [fill(pool, page, page) for page in range(4)]
    keys = ["a", "b", "c", "d"]
    assert one.batch_exists(keys) == 0
    assert one.batch_get_v1(keys, slots(pool, 0, 1, 2, 3)) == [False] * 4
    assert one.batch_set_v1(keys, slots(pool, 0, 1, 2, 3)) == [True] * 4
    assert one.batch_exists([*keys, "e"]) == 4
    fresh = make(layout, page_size)
    two = open_backend(fresh)
    assert two.batch_get_v1(["d", "x", "b"], slots(fresh, 7, 9, 5)) == [True, False, True]
    assert torch.equal(read(fresh, 7), wrote[3])
    assert torch.equal(read(fresh, 5), wrote[1])
    untouched = [page for page in range(pools.PAGES) if page not in (5, 7, 9)]
    assert not any(read(fresh, page).any() for page in untouched)


@pytest.mark.parametrize(("make", "layout"), EVERY)
def test_pages_as_tensors(open_backend: Open, make: Any, layout: str) -> None:
    pool = make(layout)
    one = open_backend(pool)
    wrote = [fill(pool, page, page) for page in range(3)]
    assert one.batch_set(["a", "b", "c"], [pool.get_data_page(page * pool.page_size) for page in range(3)])
    assert one.set("a", wrote[0])  # again
    ready = [pool.get_dummy_flat_data_page() for _ in range(4)]
    got = one.batch_get(["c", "a", "x", "b"], ready)
    assert [page is None for page in got] == [False, False, True, False]
    assert all(got[place] is ready[place] for place in (0, 1, 3))
    assert torch.equal(torch.stack([ready[1], ready[3], ready[0]]), torch.stack(wrote))
    unasked = one.get("b")
    assert unasked is not None
    assert torch.equal(unasked.flatten(), wrote[1])
    assert one.get("x", ready[2]) is None
    assert one.exists("c")
    assert not one.exists("x")
    shaped = wrote[0].view(2, -1) if make is mha else wrote[0].view(LAYERS, -1)
    assert one.set("shaped", shaped)
    assert torch.equal(one.get("shaped", ready[0]), wrote[0])


@pytest.mark.parametrize("make", [mha, mla])
def test_pages_written_in_one_order_are_read_in_any_other(open_backend: Open, make: Any) -> None:
    layouts = [layout for maker, layout in EVERY if maker is make]
    for count, writes in enumerate(layouts):
        source = make(writes)
        fill(source, 3, count)
        assert open_backend(source).batch_set_v1([writes], slots(source, 3)) == [True]
        for reads in layouts:
            pool = make(reads)
            assert open_backend(pool).batch_get_v1([writes], slots(pool, 8)) == [True]
            assert torch.equal(canonical(pool, 8), canonical(source, 3)), f"{writes} read as {reads}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn])
def test_types(open_backend: Open, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.engines.sglang.hicache.kv_cache_dtype", lambda: "fp8_e4m3")  # SGLang keeps it as uint8
    pool = mha("page_first_direct", dtype=dtype)
    one = open_backend(pool)
    wrote = fill(pool, 0, 1)
    assert one.batch_set_v1(["a"], slots(pool, 0)) == [True]
    assert one.batch_get_v1(["a"], slots(pool, 1)) == [True]
    assert torch.equal(read(pool, 1).view(torch.uint8), wrote.view(torch.uint8))


def test_where_a_page_lies_as_it_is_stored_it_is_not_copied() -> None:
    for layout, is_in_place in (("page_first_direct", True), ("layer_first", False)):
        pool = mha(layout)
        pages = HostPages.of(pool, model="m", revision="r", tp_rank=0, tp_size=1)
        halves = pages.halves(pages.at(4))
        assert [half.is_contiguous() for half in halves] == [is_in_place] * 2
        if is_in_place:
            views(halves)[1][:2] = b"\x80\x3f"  # bfloat16 1.0
            assert pool.get_data_page(4)[pool.get_data_page(4).numel() // 2] == 1.0


def test_keys_may_be_any_text(open_backend: Open) -> None:
    pool = mha()
    one = open_backend(pool)
    keys = ["", "../x", "å/\n", "k" * 1000]
    wrote = [fill(pool, page, page) for page in range(4)]
    assert one.batch_set_v1(keys, slots(pool, 0, 1, 2, 3)) == [True] * 4
    assert one.batch_get_v1(keys, slots(pool, 4, 5, 6, 7)) == [True] * 4
    assert all(torch.equal(read(pool, 4 + page), wrote[page]) for page in range(4))


def test_lookups_count_to_the_first_gap(open_backend: Open) -> None:
    pool = mha()
    one = open_backend(pool)
    one.batch_set_v1(["a", "b", "d"], slots(pool, 0, 1, 2))
    assert one.batch_exists(["a", "b", "c", "d"]) == 2
    assert one.batch_exists(["d", "a"]) == 2
    assert one.batch_exists(["c", "a"]) == 0
    assert one.batch_exists([]) == 0
    assert one.batch_set_v1([], slots(pool, 0)[:0]) == []


def test_a_write_longer_than_the_staging_is_stored_in_several(open_backend: Open) -> None:
    pool = mha()
    one = open_backend(pool, extra={"staging_bytes": 2 * PAGE_BYTES})
    keys = [f"k{page}" for page in range(9)]
    for page in range(9):
        fill(pool, page, page)
    assert one.batch_set_v1(keys, slots(pool, *range(9))) == [True] * 9
    assert one.chunks.metrics.dropped == 0


# -- durable, shared, bounded, checked ------------------------------------------------------------------------------


def child(url: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Another process over the store: see hicache_child.py."""
    script = Path(__file__).with_name("hicache_child.py")
    return subprocess.run([sys.executable, "-W", "ignore", script, url, *words], capture_output=True, text=True)


def test_what_was_stored_survives_kill_9(open_backend: Open, tmp_path: Path) -> None:
    url = (tmp_path / "durable").as_uri()  # with every fsync
    done = child(url, "set", "0", "20", "die")
    assert done.returncode == -signal.SIGKILL, done.stderr
    pool = mha()
    one = open_backend(pool, url=url)
    keys = [f"k{page}" for page in range(20)]
    assert one.batch_exists(keys) == 20
    assert one.batch_get_v1(keys, slots(pool, *range(20))) == [True] * 20
    assert all(torch.equal(read(pool, page), fill(mha(), 0, page)) for page in range(20))


def test_processes_share_a_store(open_backend: Open, store_url: str) -> None:
    pool = mha()
    one = open_backend(pool)
    fill(pool, 0, 100)
    assert one.batch_set_v1(["mine"], slots(pool, 0)) == [True]
    script = Path(__file__).with_name("hicache_child.py")
    ranges = [("0", "20"), ("10", "30"), ("20", "40")]
    writers = [
        subprocess.Popen([sys.executable, "-W", "ignore", script, store_url, "set", *pair, "mine"], text=True)
        for pair in ranges
    ]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    keys = [f"k{page}" for page in range(40)]
    assert one.batch_exists(["mine", *keys]) == 41  # learns of all that others have stored
    for start in (0, 20):
        assert all(one.batch_get_v1(keys[start : start + 20], slots(pool, *range(20))))
        assert all(torch.equal(read(pool, page), fill(mha(), 0, start + page)) for page in range(20))


def test_a_server_that_asks_seldom_learns_later(open_backend: Open) -> None:
    pool = mha()
    one, slow = open_backend(pool), open_backend(mha(), extra={"refresh_s": 3600})
    assert one.batch_set_v1(["a"], slots(pool, 0)) == [True]
    assert not slow.exists("a")
    assert open_backend(mha(), extra={"refresh_s": 0}).exists("a")


def segments(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.stat().st_size >= PAGE_BYTES // 2]


def test_a_damaged_page_is_a_miss_and_heals(
    open_backend: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = mha()
    one = open_backend(pool)
    wrote = [fill(pool, page, page) for page in range(3)]
    keys = ["a", "b", "c"]
    for page, key in enumerate(keys):
        assert one.batch_set_v1([key], slots(pool, page)) == [True]
    one.close()
    needle = bytes(wrote[1].view(torch.uint8).tolist())[: PAGE_BYTES // 2]
    (holder,) = [path for path in segments(tmp_path / "store") if needle in path.read_bytes()]
    content = holder.read_bytes()
    place = content.index(needle)
    holder.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])

    two = open_backend(pool)
    assert two.batch_exists(keys) == 3
    with caplog.at_level(logging.WARNING, "kvist.hicache"):
        assert two.batch_get_v1(keys, slots(pool, 10, 11, 12)) == [True, False, True]
    assert "a chunk is lost" in caplog.text
    assert torch.equal(read(pool, 10), wrote[0])
    assert torch.equal(read(pool, 12), wrote[2])
    assert two.batch_exists(keys) == 1
    assert two.chunks.metrics.damaged == 1
    fill(pool, 1, 1)
    assert two.batch_set_v1(["b"], slots(pool, 1)) == [True]
    assert two.batch_get_v1(["b"], slots(pool, 13)) == [True]
    assert torch.equal(read(pool, 13), wrote[1])
    three = open_backend(pool)
    assert three.batch_get_v1(keys, slots(pool, 14, 15, 16)) == [True] * 3


def test_the_bound_holds_and_what_is_used_stays(open_backend: Open) -> None:
    pool = mha()
    one = open_backend(pool, extra={"max_bytes": 8 * PAGE_BYTES})
    for number in range(40):
        fill(pool, 0, number)
        one.batch_set_v1([f"k{number}"], slots(pool, 0))
        assert one.chunks.nbytes <= 8 * PAGE_BYTES
        if number >= 1:
            assert one.batch_get_v1(["k0"], slots(pool, 1)) == [True]
    assert torch.equal(read(pool, 1), fill(mha(), 0, 0))
    assert one.chunks.metrics.evicted > 0
    assert not one.exists("k1")
    assert one.exists("k39")


def test_a_write_beyond_the_bound_says_what_is_not_there(open_backend: Open) -> None:
    pool = mha()
    one = open_backend(pool, extra={"max_bytes": 4 * PAGE_BYTES})
    for page in range(10):
        fill(pool, page, page)
    keys = [f"k{page}" for page in range(10)]
    done = one.batch_set_v1(keys, slots(pool, *range(10)))
    assert 0 < sum(done) <= 4
    assert done == [one.exists(key) for key in keys]
    assert not one.batch_set([f"x{page}" for page in range(10)], [read(pool, page) for page in range(10)])


def test_readers_beside_a_writer(open_backend: Open) -> None:
    """As SGLang's threads do: one backs up, one looks up, one prefetches; each page of the pool is one thread's."""
    pool = mha("page_first_direct")
    one = open_backend(pool, extra={"max_bytes": 12 * PAGE_BYTES})
    source, contents = mha("page_first_direct"), {}
    for number in range(16):
        contents[f"k{number}"] = fill(source, 0, number)
    wrong: list[str] = []
    is_over = threading.Event()

    def back_up() -> None:
        for turn in range(60):
            fill(pool, 0, turn % 16)
            one.batch_set_v1([f"k{turn % 16}"], slots(pool, 0))
        is_over.set()

    def prefetch() -> None:
        while not is_over.is_set():
            for key, wanted in contents.items():
                if one.batch_get_v1([key], slots(pool, 1)) == [True] and not torch.equal(read(pool, 1), wanted):
                    wrong.append(key)

    def look_up() -> None:
        while not is_over.is_set():
            one.batch_exists(list(contents))

    threads = [threading.Thread(target=work) for work in (back_up, prefetch, look_up)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert one.chunks.metrics.read > 0
    assert one.chunks.metrics.damaged == 0


def test_clear_is_for_all_servers(open_backend: Open) -> None:
    pool = mha()
    one, two = open_backend(pool), open_backend(mha())
    one.batch_set_v1(["a", "b"], slots(pool, 0, 1))
    assert two.batch_exists(["a", "b"]) == 2
    one.batch_set_v1(["c"], slots(pool, 2))
    assert two.clear()  # of c too, of which it had not heard
    assert two.batch_exists(["a"]) == 0
    assert open_backend(mha()).batch_exists(["a"]) == 0
    fill(pool, 5, 5)
    assert two.batch_set_v1(["a"], slots(two.pages.pool, 5)) == [True]


def test_clear_says_whether_the_store_forgot(open_backend: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = mha()
    one = open_backend(pool)
    one.batch_set_v1(["a"], slots(pool, 0))

    def fail(self: PrefixCache) -> None:
        raise StoreError("away")

    with monkeypatch.context() as patch:
        patch.setattr(PrefixCache, "flush", fail)
        assert not one.clear()
    assert open_backend(mha()).exists("a")
    two = open_backend(mha())
    assert two.clear()
    assert not open_backend(mha()).exists("a")


# -- faults ---------------------------------------------------------------------------------------------------------


def test_a_store_that_is_gone_is_a_miss(open_backend: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = mha()
    one = open_backend(pool)
    wrote = fill(pool, 0, 0)
    assert one.batch_set_v1(["a"], slots(pool, 0)) == [True]
    (tmp_path / "store").rename(tmp_path / "away")
    with caplog.at_level(logging.WARNING, "kvist.hicache"):
        assert one.batch_get_v1(["a"], slots(pool, 1)) == [False]
        assert one.batch_set_v1(["b"], slots(pool, 1)) == [False]
        assert not one.set("c", read(pool, 1))
        assert one.batch_exists(["b"]) == 0
    for text in ("a chunk is lost", "1 chunks are not stored", "is not known"):
        assert text in caplog.text
    (tmp_path / "away").rename(tmp_path / "store")
    assert one.batch_set_v1(["a", "b"], slots(pool, 0, 0)) == [True, True]
    assert one.batch_get_v1(["a", "b"], slots(pool, 1, 2)) == [True, True]
    assert torch.equal(read(pool, 1), wrote)


def test_a_store_that_cannot_be_opened(open_backend: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(KvistError):
        open_backend(url=(tmp_path / "file" / "store").as_uri())


def test_a_closed_backend_misses(open_backend: Open) -> None:
    pool = mha()
    one = open_backend(pool)
    one.batch_set_v1(["a"], slots(pool, 0))
    one.close()
    one.close()
    assert one.batch_set_v1(["b"], slots(pool, 1)) == [False]
    assert not one.exists("b")


def test_what_happened_is_told(open_backend: Open) -> None:
    pool = mha()
    one = open_backend(pool)
    fill(pool, 0, 0)
    fill(pool, 1, 1)
    one.batch_set_v1(["a", "b"], slots(pool, 0, 1))
    one.batch_get_v1(["a", "b", "c"], slots(pool, 2, 3, 4))
    metrics = one.chunks.metrics
    assert (metrics.stored, metrics.read, metrics.missed) == (2, 2, 1)
    assert (metrics.bytes_stored, metrics.bytes_read) == (2 * PAGE_BYTES, 2 * PAGE_BYTES)
    stats = one.get_stats()
    if pools.HAS_SGLANG:
        assert (stats.backup_pgs, stats.prefetch_pgs) == ([2], [2])
        assert stats.backup_bandwidth[0] > 0
        assert one.get_stats().backup_pgs == []


def test_a_repository_that_others_read(open_backend: Open, store_url: str) -> None:
    pool = mha()
    one = open_backend(pool)
    one.batch_set_v1(["a", "b"], slots(pool, 0, 1))
    layout = one.pages.layout
    one.close()
    with Repository.open(store_url) as repo:
        (branch,) = repo.refs.all(RefKind.BRANCH)
        assert branch.name.startswith("cache/")
        assert branch.cid is not None
        (cid,) = repo.objects.snapshot(branch.cid).manifests
        manifest = repo.manifest(cid)
    assert manifest.layout == layout
    assert len(manifest.pages) == 2


def test_importing_it_needs_no_sglang() -> None:
    code = "import sys; sys.modules['sglang'] = None; import kvist.engines.sglang.hicache as h; h.KvistHiCache"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
