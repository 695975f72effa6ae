"""Packing a cartridge, and injecting it, against writing the same tokens straight into the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.model import ModelIdentity
from kvist.engines.paged.matching import blocks_of, window_of
from kvist.engines.paged.pages import Done, GroupPages
from kvist.engines.vllm.cartridges import packing
from kvist.engines.vllm.cartridges.packing import Packed, Packer
from kvist.engines.vllm.pages import pages_of
from kvist.errors import InvalidInput, LayoutMismatch
from kvist.layout import Layout

SIZE = 4
BLOCKS = 24
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class Backend:
    """Writes as attention backends do: a token's K and V side by side, or all K of a head before its V, transposed."""

    def __init__(self, order: str) -> None:
        self.order = order

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        assert slots.dtype == torch.int64
        assert len(key) == len(value) == len(slots)
        dim = key.shape[-1]
        for token, slot in enumerate(slots.tolist()):
            block, row = divmod(slot, SIZE)
            for head in range(key.shape[1]):
                if self.order == "LHND":
                    cache[block, head, row, :dim] = key[token, head]
                    cache[block, head, row, dim:] = value[token, head]
                else:
                    flat = cache[block, head].view(2, SIZE * dim)
                    flat[0].view(dim, SIZE)[:, row] = key[token, head]
                    flat[1].view(SIZE, dim)[row] = value[token, head]


@dataclass
class Attention:
    impl: Backend


@dataclass
class Engine:
    """Caches of one rank, and what packs for them; ``groups`` says which layers are in which group."""

    layouts: list[Layout]
    caches: list[list[torch.Tensor]]
    pages: list[GroupPages]
    packer: Packer


def engine(
    groups: list[list[int]], *, order: str = "LHND", heads: int = 2, dim: int = 8, dtype: str = "f32", rank: int = 0,
    ranks: int = 1, windows: tuple[int | None, ...] = (None,), strided: bool = False,
) -> Engine:  # fmt: skip
    layouts, caches, pages, layers = [], [], [], []
    for number, members in enumerate(groups):
        window = windows[number]
        layout = Layout(
            page_size_tokens=SIZE, n_layers=len(members), n_heads=heads, head_dim=dim, dtype=dtype, memory_order=order,
            tp_rank=rank, tp_size=ranks, attention="full" if window is None else f"sliding:{window}", group=number,
            n_groups=len(groups),
        )  # fmt: skip
        shape = (BLOCKS, SIZE, heads, 2 * dim) if strided else (BLOCKS, heads, SIZE, 2 * dim)
        made = [torch.randn(shape).to(DTYPES[dtype]) for _ in members]
        made = [cache.transpose(1, 2) for cache in made] if strided else made
        layouts.append(layout)
        caches.append(made)
        pages.append(pages_of(layout, made, BLOCKS))
        layers.append([(index, Attention(Backend(order)), cache) for index, cache in zip(members, made, strict=True)])
    return Engine(layouts, caches, pages, Packer(layouts, pages, layers))


def cartridge(tokens: int, *, layers: int = 3, heads: int = 2, dim: int = 8, dtype: str = "float32") -> Cartridge:
    model = ModelIdentity(model_id="m", num_layers=layers, num_kv_heads=heads, head_dim=dim, dtype=dtype)
    draw = torch.Generator().manual_seed(tokens)
    kind = getattr(torch, dtype)
    made = [tuple(torch.randn(tokens, heads, dim, generator=draw).to(kind) for _ in range(2)) for _ in range(layers)]
    return Cartridge.create(made, model, cartridge_id="c")  # type: ignore[arg-type]


def pack(here: Engine, made: Cartridge) -> Packed:
    """From buffers that are used again for the next layer, as a reader of files hands them out."""
    keys, values = (torch.empty_like(half) for half in made.layer(0))

    def layers() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for number in range(made.num_layers):
            keys.copy_(made.layer(number)[0])
            values.copy_(made.layer(number)[1])
            yield number, keys, values
            keys.fill_(float("nan"))
            values.fill_(float("nan"))

    return here.packer.pack(made.manifest, layers())


def inject(here: Engine, made: Cartridge, tokens: int, tables: list[list[int]]) -> None:
    packed = pack(here, made)
    windows = [window_of(layout) for layout in here.layouts]
    for group, pages in enumerate(here.pages):
        numbers = [number for one, number in blocks_of(tokens, 0, windows, SIZE) if one == group]
        slots = [number - packed.first[group] for number in numbers]
        pages.write([tables[group][number] for number in numbers], packed.rows[group], slots, Done()).wait()
    assert sum(rows.nbytes for rows in packed.rows) == here.packer.size_of(made.manifest)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 19),
    order=st.sampled_from(["LHND", "vllm-cpu-vec"]),
    dtype=st.sampled_from(["f32", "bf16"]),
    dim=st.sampled_from([1, 3, 8]),
    ranks=st.sampled_from([1, 2, 4, 8]),
    chunk=st.sampled_from([1, 16 << 20]),
    data=st.data(),
)
def test_blocks_hold_what_the_backend_would_have_written(
    tokens: int, order: str, dtype: str, dim: int, ranks: int, chunk: int, data: st.DataObject
) -> None:
    """In any blocks; of any rank, with more ranks than heads too; and no other block is touched."""
    rank = data.draw(st.integers(0, ranks - 1))
    table = data.draw(st.permutations(range(1, BLOCKS)))[: -(-tokens // SIZE)]
    heads = max(1, 4 // ranks)
    first = rank * 4 // ranks
    here = engine([[0, 1, 2]], order=order, heads=heads, dim=dim, dtype=dtype, rank=rank, ranks=ranks)
    made = cartridge(tokens, heads=4, dim=dim, dtype={"f32": "float32", "bf16": "bfloat16"}[dtype])
    before = [cache.clone() for cache in here.caches[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CHUNK", chunk)
        inject(here, made, tokens, [table])
    for index, cache in enumerate(here.caches[0]):
        wanted = torch.zeros_like(cache)
        slots = torch.tensor([table[token // SIZE] * SIZE + token % SIZE for token in range(tokens)])
        keys, values = (half[:, first : first + heads] for half in made.layer(index))
        Backend(order).do_kv_cache_update(None, keys, values, wanted, slots)
        assert torch.equal(cache[table], wanted[table])
        others = [block for block in range(BLOCKS) if block not in table]
        assert torch.equal(cache[others], before[index][others])


def test_a_cache_seen_through_strides() -> None:
    here, plain = engine([[0, 1, 2]], strided=True), engine([[0, 1, 2]])
    made = cartridge(10)
    for one in (here, plain):
        inject(one, made, 10, [[5, 3, 9]])
    for cache, other in zip(here.caches[0], plain.caches[0], strict=True):
        assert not cache.is_contiguous()
        assert torch.equal(cache[[5, 3, 9]], other[[5, 3, 9]])


def test_layers_in_groups_with_windows_keep_only_what_can_be_seen() -> None:
    here = engine([[2], [0, 1]], windows=(None, 5))
    made = cartridge(18)
    packed = pack(here, made)
    assert packed.first == (0, 3)  # the 17th token looks back to the 13th
    assert [len(rows) for rows in packed.rows] == [5, 2]
    inject(here, made, 18, [[1, 2, 3, 4, 5], [0, 0, 0, 11, 12]])
    keys, values = made.layer(1)
    cache = here.caches[1][1]
    assert torch.equal(cache[11, :, :, :8], keys[12:16].transpose(0, 1))
    assert torch.equal(cache[12, :, :2, 8:], values[16:18].transpose(0, 1))
    assert torch.equal(here.caches[0][0][1, :, :, :8], made.layer(2)[0][:4].transpose(0, 1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": 2}, "layers: 2 there, 3 here"),
        ({"heads": 4}, "heads a rank: 4 there, 2 here"),
        ({"dim": 16}, "head_dim: 16 there, 8 here"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16 there, float32 here"),
        ({"layers": 2, "dim": 16}, "layers: 2 there, 3 here; head_dim: 16 there, 8 here"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_values(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(LayoutMismatch, match=said):
        pack(engine([[0, 1, 2]]), cartridge(5, **wrong))


def test_heads_that_cannot_be_dealt_out() -> None:
    with pytest.raises(InvalidInput, match="4 KV heads cannot be dealt out evenly to 3"):
        pack(engine([[0, 1, 2]], ranks=3), cartridge(5, heads=4))


def test_a_layer_without_a_cache_of_its_own() -> None:
    with pytest.raises(LayoutMismatch, match=r"those of \[0, 2\]"):
        engine([[0, 2]])
