"""`SglangPager` on SGLang's own pools, allocators and prefix cache. Runs where sglang is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hicache_real import HAS_SGLANG, load

torch = pytest.importorskip("torch")
if not HAS_SGLANG:
    pytest.skip("sglang is not installed in this environment (make test-sglang)", allow_module_level=True)
load("mem_cache.unified_radix_cache")

from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402
from test_pools import allocator, buffers, mha, mla  # noqa: E402

from kvist.engines.sglang import internals  # noqa: E402
from kvist.engines.sglang.pager import SglangPager  # noqa: E402
from kvist.pager import CachePager, LogicalSeq  # noqa: E402
from kvist.testing.pager import PagerTests  # noqa: E402


def scheduler(pool: Any) -> Any:
    """As much of SGLang's scheduler as holds its pools and its prefix cache."""
    sharing = allocator(pool)
    rows = ReqToTokenPool(4, 256, "cpu", enable_memory_saver=False)
    tree = UnifiedRadixCache(
        CacheInitParams(
            disable=False,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=sharing,
            page_size=pool.page_size,
            tree_components=(ComponentType.FULL,),
        )
    )
    return SimpleNamespace(
        token_to_kv_pool_allocator=sharing,
        req_to_token_pool=rows,
        tree_cache=tree,
        running_batch=None,
        last_batch=None,
        chunked_req=None,
        waiting_queue=[],
        grammar_manager=SimpleNamespace(grammar_queue=[]),
    )


def install(pager: SglangPager, name: str, tokens: int, *, first: int) -> None:
    """A sequence of so many computed tokens, and one more, over pages of random content."""
    size = pager.meta().page_size_tokens
    ixs = pager.allocate_pages(-(-tokens // size))
    data = torch.randint(0, 255, (len(ixs) * 2 * pager.meta().page_bytes,), dtype=torch.uint8)
    pager.write_pages(ixs, memoryview(bytearray(data.numpy().tobytes())), [None] * len(ixs))
    ids = tuple(range(first, first + tokens + 1))
    pager.install_logical_seqs([LogicalSeq(name, tuple(ixs), tokens % size, ids, {"prompt_tokens": 3})])


class SglangPagerTests(PagerTests):
    """By pool and size of pages."""

    page_size = 16

    def make_pool(self) -> Any:
        raise NotImplementedError

    def make_pager(self) -> CachePager:
        self.scheduler = scheduler(self.make_pool())
        pager = SglangPager(self.scheduler, "org/model", "abc")
        for number, tokens in enumerate((self.page_size * 2, self.page_size * 2 + self.page_size // 2)):
            install(pager, f"seq-{number}", max(tokens, 2), first=1000 * number + 10)
        return pager

    def make_empty(self) -> CachePager:
        self.scheduler = scheduler(self.make_pool())
        return SglangPager(self.scheduler, "org/model", "abc")

    def second_pager(self, pager: CachePager) -> CachePager:
        return SglangPager(self.scheduler, "org/model", "abc")


class TestTokens(SglangPagerTests):
    page_size = 1

    def make_pool(self) -> Any:
        return mha(1)


class TestPages(SglangPagerTests):
    def make_pool(self) -> Any:
        return mha(16)


class TestLatent(SglangPagerTests):
    def make_pool(self) -> Any:
        return mla(16)


def test_the_prefix_cache_has_what_was_installed() -> None:
    """All but the partly filled last page; what is dropped can be evicted, and nothing is lost."""
    engine = scheduler(mha(16))
    free = engine.token_to_kv_pool_allocator.available_size()
    pager = SglangPager(engine, "org/model", "abc")
    install(pager, "one", 40, first=10)
    tokens, node = internals.match(engine.tree_cache, range(10, 50), None, None)
    assert tokens == 32
    slots = engine.tree_cache.path_device_indices(node)
    assert (slots // 16).tolist() == [ix for ix in pager.logical_seqs()[0].page_ixs[:2] for _ in range(16)]
    assert buffers(engine.token_to_kv_pool_allocator.get_kvcache())[0][slots].any()
    pager.drop("one")
    assert pager.logical_seqs() == []
    assert len(pager.allocate_pages(free // 16)) == free // 16, "SGLang evicts what nobody locks"


def test_two_that_begin_alike() -> None:
    """The second one's pages are its own where the prefix cache has these tokens already."""
    engine = scheduler(mha(16))
    free = engine.token_to_kv_pool_allocator.available_size()
    pager = SglangPager(engine, "org/model", "abc")
    install(pager, "one", 40, first=10)
    install(pager, "two", 64, first=10)
    one, two = pager.logical_seqs()
    assert set(one.page_ixs).isdisjoint(two.page_ixs)
    assert internals.match(engine.tree_cache, range(10, 74), None, None)[0] == 64
    for name in ("one", "two"):
        pager.drop(name)
    assert len(pager.allocate_pages(free // 16)) == free // 16
