"""Pages of caches that have K and V apart, as those that have both in one tensor."""

from __future__ import annotations

import pytest
import torch

from kvist.engines.paged.pages import Done, GroupPages
from kvist.layout import Layout

BLOCKS = 12


@pytest.mark.parametrize(("dim", "dtype"), [(1, torch.bfloat16), (3, torch.float32), (8, torch.float16)])
def test_apart_or_together_a_page_is_the_same(dim: int, dtype: torch.dtype) -> None:
    name = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}[dtype]
    layout = Layout(page_size_tokens=4, n_layers=3, n_heads=2, head_dim=dim, dtype=name)
    pool = [torch.randn(2, BLOCKS * 4, 2, dim).to(dtype) for _ in range(3)]  # K's slots, then V's, of each layer
    apart = [[half.view(BLOCKS, 1, 4, 2, dim) for half in layer] for layer in pool]
    together = [[torch.cat(layer, dim=1)] for layer in apart]
    groups = [GroupPages(layout, layers, BLOCKS) for layers in (apart, together)]
    read = []
    for group in groups:
        rows = torch.zeros((3, group.page_bytes), dtype=torch.uint8)
        group.read([7, 2, 3], rows, [0, 1, 2]).wait()
        read.append(rows)
    assert torch.equal(*read)
    page = read[0][1].view(dtype).view(2, 3, 4, 2, dim)
    for number, (k, v) in enumerate(pool):
        assert torch.equal(page[0, number], k[8:12]) and torch.equal(page[1, number], v[8:12])
    before = [layer.clone() for layer in pool]
    groups[0].write([0, 11], read[0], [1, 2], Done()).wait()
    for layer, old in zip(pool, before, strict=True):
        assert torch.equal(layer[:, :4], old[:, 8:12]) and torch.equal(layer[:, 44:], old[:, 12:16])
        assert torch.equal(layer[:, 4:44], old[:, 4:44])
