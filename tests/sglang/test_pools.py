"""Pages of SGLang's own pools, handed out by its own allocators, without a model. Runs where sglang is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hicache_real import HAS_SGLANG, load

torch = pytest.importorskip("torch")
if not HAS_SGLANG:
    pytest.skip("sglang is not installed in this environment (make test-sglang)", allow_module_level=True)
load("mem_cache.memory_pool")

from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.memory_pool import (  # noqa: E402
    MHATokenToKVPool,
    MHATokenToKVPoolFP4,
    MLATokenToKVPool,
)

from kvist.engines.paged.pages import Done, GroupPages  # noqa: E402
from kvist.engines.paged.staging import HostPool  # noqa: E402
from kvist.engines.sglang import internals  # noqa: E402
from kvist.engines.sglang.generations import Generations  # noqa: E402
from kvist.errors import UnsupportedModel  # noqa: E402

SLOTS, LAYERS, HEADS, DIM = 256, 3, 2, 8
LATENT, ROPE = 24, 8


def mha(page_size: int, *, kind: Any = MHATokenToKVPool, dtype: Any = torch.bfloat16, **more: Any) -> Any:
    settings = {"enable_memory_saver": False, "enable_alt_stream": False} | more
    return kind(SLOTS, page_size, dtype, HEADS, DIM, LAYERS, "cpu", **settings)


def mla(page_size: int, *, dtype: Any = torch.float32, **more: Any) -> Any:
    return MLATokenToKVPool(SLOTS, page_size, dtype, LATENT, ROPE, LAYERS, "cpu", enable_memory_saver=False, **more)


def allocator(pool: Any) -> Any:
    if pool.page_size == 1:
        return TokenToKVPoolAllocator(SLOTS, pool.dtype, "cpu", pool, need_sort=False)
    return PagedTokenToKVPoolAllocator(SLOTS, pool.page_size, pool.dtype, "cpu", pool, need_sort=False)


@pytest.fixture(params=["mha", "mla"])
def make(request: pytest.FixtureRequest) -> Any:
    return mha if request.param == "mha" else mla


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_layouts(page_size: int) -> None:
    """K and V, or the halves of one latent vector; in the order of tokens."""
    plain = internals.layout_of(allocator(mha(page_size)), "org/model", "abc")
    assert (plain.page_size_tokens, plain.n_layers, plain.n_heads, plain.head_dim) == (page_size, LAYERS, HEADS, DIM)
    assert (plain.dtype, plain.memory_order, plain.attention) == ("bf16", "LNHD", "full")
    latent = internals.layout_of(allocator(mla(page_size)), "org/model", "abc")
    assert (latent.n_heads, latent.head_dim, latent.attention) == (1, (LATENT + ROPE) // 2, "mla")
    assert latent.page_bytes * 2 == page_size * LAYERS * (LATENT + ROPE) * 4


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pages_are_what_sglang_reads_there(page_size: int, make: Any) -> None:
    """Out of one pool's pages and into another's: the slots are equal, bit for bit."""
    here, there = make(page_size), make(page_size)
    for buffer in buffers(here):
        buffer.copy_(torch.randn(buffer.shape))
    sharing, taking = allocator(here), allocator(there)
    held, slots = sharing.alloc(page_size * 2), taking.alloc(page_size * 2)
    if page_size == 1:  # at other places
        slots = taking.alloc(2)
    layout = internals.layout_of(sharing, "org/model", "abc")
    source = GroupPages(layout, *internals.layers(sharing))
    target = GroupPages(layout, *internals.layers(taking))
    pool = HostPool(4 * source.page_bytes, source.page_bytes)
    rows = pool.take(2, wait=True)
    source.read((held[::page_size] // page_size).tolist(), pool.rows, rows).wait()
    target.write((slots[::page_size] // page_size).tolist(), pool.rows, rows, Done()).wait()
    for one, other in zip(buffers(here), buffers(there), strict=True):
        assert torch.equal(one[held], other[slots])
    k, v = pool.halves(rows, layout.page_bytes)[:2]
    first = held[:page_size]
    if isinstance(here, MHATokenToKVPool):
        assert bytes(k) == raw(torch.stack([buffer[first] for buffer in here.k_buffer]))
        assert bytes(v) == raw(torch.stack([buffer[first] for buffer in here.v_buffer]))
    else:
        whole = torch.stack([buffer[first, 0] for buffer in here.kv_buffer])
        assert bytes(k) == raw(whole[..., : whole.shape[-1] // 2])
        assert bytes(v) == raw(whole[..., whole.shape[-1] // 2 :])


def raw(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def buffers(pool: Any) -> list[Any]:
    return [*pool.k_buffer, *pool.v_buffer] if isinstance(pool, MHATokenToKVPool) else list(pool.kv_buffer)


@pytest.fixture
def hnd() -> Iterator[None]:
    from sglang.srt.environ import envs

    with envs.SGLANG_USE_HND_KVCACHE.override(True):
        yield


def test_another_order_is_refused(hnd: None) -> None:
    with pytest.raises(UnsupportedModel, match="laid out 'hnd', expected 'nhd'"):
        internals.check_pool(allocator(mha(16)))


@pytest.mark.parametrize(
    ("pool", "named"),
    [
        (lambda: mha(16, dtype=torch.float8_e4m3fn), "holds torch.float8_e4m3fn, expected one of torch.bfloat16"),
        (lambda: mha(16, kind=MHATokenToKVPoolFP4), "is MHATokenToKVPoolFP4, expected MHATokenToKVPool or MLATokenTo"),
        (lambda: mha(16, v_head_dim=4), "head of K has 8 elements and one of V 4"),
        (lambda: mla(16, use_dsa=True), "and an index or scales beside it"),
    ],
    ids=["fp8", "fp4", "uneven", "sparse"],
)
def test_other_pools_are_refused_by_name(pool: Any, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        internals.check_pool(allocator(pool()))


def test_another_allocator_is_refused() -> None:
    class Own(TokenToKVPoolAllocator):
        pass

    with pytest.raises(UnsupportedModel, match="shared out by Own, expected TokenToKVPoolAllocator or Paged"):
        internals.check_pool(Own(SLOTS, torch.bfloat16, "cpu", mha(1), need_sort=False))


@pytest.mark.parametrize("page_size", [1, 16])
def test_generations_count_what_is_handed_out(page_size: int) -> None:
    """A page that is given back keeps its count, and its bytes, until somebody else gets it."""
    sharing = allocator(mha(page_size))
    generations = Generations(sharing, SLOTS // page_size + 1)
    slots = sharing.alloc(2 * page_size)
    pages = slots[::page_size] // page_size
    assert generations.of(pages).tolist() == [1, 1]
    sharing.free(slots)
    assert generations.of(pages).tolist() == [1, 1]
    while sharing.available_size():
        sharing.alloc(page_size)
    assert generations.of(pages).tolist() == [2, 2]
    sharing.clear()
    assert generations.of(pages).tolist() == [3, 3]


def test_a_page_that_is_written_on_is_no_other() -> None:
    """Tokens that go into a page that a request has already do not count."""
    sharing = allocator(mha(16))
    generations = Generations(sharing, SLOTS // 16 + 1)

    def extend(before: int, after: int, last: int) -> Any:
        lengths = torch.tensor([before]), torch.tensor([after])
        return sharing.alloc_extend(
            lengths[0], lengths[0], lengths[1], lengths[1], torch.tensor([last]), after - before
        )

    slots = extend(0, 10, -1)
    page = slots[:1] // 16
    more = extend(10, 14, int(slots[-1]))
    assert (more // 16 == page).all()
    assert generations.of(page).tolist() == [1]
    length = torch.tensor([15])
    assert (sharing.alloc_decode(length, length, more[-1:]) // 16 == page).all()
    assert generations.of(page).tolist() == [1]
    last = extend(15, 20, int(more[-1]) + 1)
    assert generations.of(last[-1:] // 16).tolist() == [1]
    assert int(last[-1]) // 16 != int(page)
