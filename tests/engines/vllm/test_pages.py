"""Pages out of a cache and back, in each order that vLLM keeps them in."""

from __future__ import annotations

import pytest
import torch

from kvist.engines.paged.pages import Done, GroupPages
from kvist.engines.vllm.pages import pages_of
from kvist.errors import UnsupportedModel
from kvist.layout import Layout

BLOCKS = 12


def layout(order: str, *, heads: int = 2) -> Layout:
    return Layout(page_size_tokens=4, n_layers=3, n_heads=heads, head_dim=8, dtype="f32", memory_order=order)


def make(order: str, heads: int = 2) -> tuple[GroupPages, list[torch.Tensor]]:
    caches = [torch.randn(BLOCKS, heads, 4, 16) for _ in range(3)]
    return pages_of(layout(order, heads=heads), caches, BLOCKS), caches


@pytest.mark.parametrize("order", ["LHND", "vllm-cpu-vec"])
@pytest.mark.parametrize("slots", [[0, 1, 2], [5, 1, 3], [2, 3, 7]])
def test_what_is_read_and_written_back_is_the_same(order: str, slots: list[int]) -> None:
    group, caches = make(order)
    before = [cache.clone() for cache in caches]
    rows = torch.zeros((8, group.page_bytes + 64), dtype=torch.uint8)
    group.read([4, 9, 2], rows, slots).wait()
    for cache in caches:
        cache[[4, 9, 2]] = 0
    group.write([1, 9, 2], rows, slots, Done()).wait()
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[1], old[4])
        assert torch.equal(cache[9], old[9])
        assert torch.equal(cache[2], old[2])
        assert torch.equal(cache[3], old[3])
        assert not cache[4].any()


def test_k_and_v_lie_apart_in_the_order_that_the_layout_names() -> None:
    group, caches = make("LHND")
    rows = torch.zeros((1, group.page_bytes), dtype=torch.uint8)
    group.read([7], rows, [0]).wait()
    page = rows[0].view(torch.float32).view(2, 3, 2, 4, 8)
    for number, cache in enumerate(caches):
        assert torch.equal(page[0, number], cache[7, :, :, :8])
        assert torch.equal(page[1, number], cache[7, :, :, 8:])


def test_on_the_cpu_each_heads_k_comes_before_its_v() -> None:
    group, caches = make("vllm-cpu-vec")
    rows = torch.zeros((1, group.page_bytes), dtype=torch.uint8)
    group.read([7], rows, [0]).wait()
    page = rows[0].view(torch.float32).view(2, 3, 2, 32)
    for number, cache in enumerate(caches):
        packed = cache[7].reshape(2, 2, 32)  # head; K, then V
        assert torch.equal(page[0, number], packed[:, 0])
        assert torch.equal(page[1, number], packed[:, 1])


def test_a_latent_cache_has_no_heads() -> None:
    caches = [torch.randn(BLOCKS, 4, 16) for _ in range(3)]
    group = pages_of(layout("LHND", heads=1), caches, BLOCKS)
    rows = torch.zeros((1, group.page_bytes), dtype=torch.uint8)
    group.read([3], rows, [0]).wait()
    group.write([5], rows, [0], Done()).wait()
    assert all(torch.equal(cache[3], cache[5]) for cache in caches)


def test_a_cache_seen_through_strides_is_written_in_place() -> None:
    whole = [torch.randn(BLOCKS, 4, 2, 16) for _ in range(3)]  # tokens before heads, as on an accelerator
    group = pages_of(layout("LHND"), [cache.transpose(1, 2) for cache in whole], BLOCKS)
    rows = torch.zeros((1, group.page_bytes), dtype=torch.uint8)
    group.read([0], rows, [0]).wait()
    group.write([11], rows, [0], Done()).wait()
    assert all(torch.equal(cache[0], cache[11]) for cache in whole)


def test_another_shape_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"expected \(12, 2, 4, 16\)"):
        pages_of(layout("LHND"), [torch.zeros(BLOCKS, 2, 8, 16)] * 3, BLOCKS)


@pytest.mark.parametrize("order", ["LHND", "vllm-cpu-vec"])
@pytest.mark.parametrize(
    ("dim", "dtype", "more"), [(1, "bf16", 0), (1, "bf16", 2), (3, "bf16", 4), (3, "f32", 12), (8, "f32", 4)]
)
def test_pages_of_any_width_in_rows_of_any(order: str, dim: int, dtype: str, more: int) -> None:
    """Copies go by the widest word that fits; whichever that is, the bytes are the same."""
    kind = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    here = Layout(page_size_tokens=4, n_layers=2, n_heads=3, head_dim=dim, dtype=dtype, memory_order=order)
    caches = [torch.randn(BLOCKS, 3, 4, 2 * dim).to(kind) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    group = pages_of(here, caches, BLOCKS)
    rows = torch.zeros((4, group.page_bytes + more), dtype=torch.uint8)
    group.read([4, 9, 2], rows, [0, 1, 3]).wait()
    group.write([1, 9, 7], rows, [0, 1, 3], Done()).wait()
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[[1, 9, 7]], old[[4, 9, 2]])
        others = [block for block in range(BLOCKS) if block not in (1, 9, 7)]
        assert torch.equal(cache[others], old[others])
