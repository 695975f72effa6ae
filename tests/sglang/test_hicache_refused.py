"""Whose pages hit, and what is refused: who differs in anything finds nothing; what cannot be right is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hicache_pools as pools
import pytest
import torch
from hicache_pools import DIM, HEADS, LAYERS, Open, fill, mha, mla, read, slots

from kvist.engines.sglang.hicache import KvistHiCache
from kvist.engines.sglang.hicache_pages import HostPages
from kvist.engines.sglang.hicache_settings import Settings
from kvist.errors import InvalidInput, LayoutMismatch, UnsupportedModel

pytest_plugins = ("hicache_fixtures",)
PAGE_BYTES = 2 * LAYERS * 4 * HEADS * DIM * 2  # of `mha()`: 4 tokens, bfloat16

# -- nobody else's pages --------------------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "model": {"model_name": "org/other"},
    "revision": {"extra": {"revision": "r2"}},
    "rank": {"tp_rank": 1, "tp_size": 2},
    "tp size": {"tp_rank": 0, "tp_size": 2},
    "stage": {"pp_rank": 1, "pp_size": 2},
    "pp size": {"pp_rank": 0, "pp_size": 2},
    "context rank": {"attn_cp_rank": 1, "attn_cp_size": 2},
    "context size": {"attn_cp_rank": 0, "attn_cp_size": 2},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_servers_pages_never_hit(open_backend: Open, name: str) -> None:
    pool = mha()
    assert open_backend(pool).batch_set_v1(["a"], slots(pool, 0)) == [True]
    other = open_backend(mha(), **OTHERS[name])
    assert not other.exists("a")
    assert other.batch_get_v1(["a"], slots(pool, 1)) == [False]
    assert other.batch_set_v1(["a"], slots(other.pages.pool, 2)) == [True]
    assert open_backend(mha(), **OTHERS[name]).exists("a")


@pytest.mark.parametrize(
    "pool",
    [lambda: mha(page_size=8), lambda: mha(dtype=torch.float16), lambda: mla()],
    ids=["page size", "type", "attention"],
)
def test_other_pools_pages_never_hit(open_backend: Open, pool: Callable[[], Any]) -> None:
    mine = mha()
    assert open_backend(mine).batch_set_v1(["a"], slots(mine, 0)) == [True]
    assert not open_backend(pool()).exists("a")


def test_other_layers_pages_never_hit(open_backend: Open) -> None:
    pool = mha()
    assert open_backend(pool).batch_set_v1(["a"], slots(pool, 0)) == [True]
    moved = mha()
    moved.start_layer, moved.end_layer = LAYERS, 2 * LAYERS
    assert not open_backend(moved).exists("a")


def test_ranks_share_a_latent_vector(open_backend: Open) -> None:
    pool = mla()
    first = open_backend(pool, tp_rank=0, tp_size=2)
    wrote = fill(pool, 0, 0)
    assert first.batch_set_v1(["a"], slots(pool, 0)) == [True]
    fresh = mla()
    assert open_backend(fresh, tp_rank=1, tp_size=2).batch_get_v1(["a"], slots(fresh, 3)) == [True]
    assert torch.equal(read(fresh, 3), wrote)
    assert not open_backend(mla(), tp_rank=0, tp_size=4).exists("a")


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"stor": "x"}, "got stor"),
        ({"file_storage_path": "/x"}, "got file_storage_path"),
        ({"store": ""}, "store must be"),
        ({"max_bytes": 0}, "max_bytes must be"),
        ({"max_bytes": PAGE_BYTES - 1}, "max_bytes cannot be"),
        ({"staging_bytes": PAGE_BYTES - 1}, "staging_bytes cannot be"),
        ({"policy": "best"}, "policy must be one of"),
        ({"refresh_s": -1}, "refresh_s must be"),
        ({"revision": 3}, "revision must be text"),
    ],
)
def test_options_that_cannot_be_right(open_backend: Open, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        open_backend(extra=extra)


def test_a_store_must_be_named() -> None:
    for extra in (None, {}, {"backend_name": "kvist", "interface_v1": 1}):
        with pytest.raises(InvalidInput, match="store is missing"):
            Settings.of_config(extra)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_lcm_size": 4}, "tp_lcm_size 4"),
        ({"should_split_heads": True}, "split by heads"),
    ],
)
def test_ranks_that_share_in_unknown_ways(open_backend: Open, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        open_backend(**fields)


def changed(**fields: Any) -> Any:
    pool = mha()
    for name, value in fields.items():
        setattr(pool, name, value)
    return pool


class OtherHostPool:
    """Of a kind that the backend does not know."""

    layout = "layer_first"


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (OtherHostPool, "host pool OtherHostPool cannot be stored: expected MHATokenToKVPoolHost or MLA"),
        (lambda: changed(layout="page_unified"), "page_unified .* expected layer_first, page_first, page_first_direct"),
        (lambda: changed(layer_num=LAYERS + 1), "1 layers of a draft model"),
        (lambda: changed(dcp_size=2), "dcp_size 2"),
        (lambda: changed(kv_buffer=None), "a host pool without memory"),
        (lambda: changed(dtype=torch.float64), "torch.float64 cannot be stored"),
        (lambda: changed(dtype=torch.uint8), "uint8, --kv-cache-dtype None cannot be stored"),
    ],
)
def test_pools_that_cannot_be_paged(open_backend: Open, pool: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        open_backend(pool())


def test_a_latent_vector_of_odd_width(open_backend: Open) -> None:
    pool = mla()
    pool.kv_cache_dim = 9
    with pytest.raises(UnsupportedModel, match="9 elements cannot be halved"):
        open_backend(pool)


def test_bytes_are_what_the_server_says_they_are() -> None:
    pool = changed(dtype=torch.uint8)
    how = {"model": "m", "revision": "r", "tp_rank": 0, "tp_size": 1}
    assert HostPages.of(pool, **how, kv_cache_dtype="fp8_e4m3").layout.dtype == "fp8e4m3"
    with pytest.raises(UnsupportedModel, match="fp8_e5m2"):
        HostPages.of(pool, **how, kv_cache_dtype="fp8_e5m2")


@pytest.mark.parametrize("name", ["swa", "mamba", "indexer", "draft"])
def test_a_model_with_other_pools_is_refused(open_backend: Open, name: str) -> None:
    one = open_backend()
    with pytest.raises(UnsupportedModel, match=f"got a pool {name} besides"):
        one.register_mem_host_pool_v2(mha(), name)


def test_weights_that_nothing_pins(open_backend: Open, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"nothing pins the weights of org/model.*--revision"):
        open_backend(extra={"revision": None})
    with pytest.raises(UnsupportedModel, match="weights of a model without a name"):
        open_backend(model_name=None, extra={"revision": None})
    found = set()
    for name in ("one", "other"):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(name.encode())
        found.add(open_backend(model_name=str(directory), extra={"revision": None}).pages.layout.revision)
    assert len(found) == 2
    assert all(revision is not None and revision.startswith("blake3:") for revision in found)


def test_a_host_pool_comes_first(store_url: str) -> None:
    one = KvistHiCache(pools.config(store_url))
    for call in (lambda: one.exists("a"), lambda: one.batch_get_v1(["a"], torch.arange(4)), one.clear):
        with pytest.raises(InvalidInput, match="expected a host pool to be registered"):
            call()
    one.close()


def test_another_host_pool_of_the_same_pages(open_backend: Open) -> None:
    pool, other = mha(), mha("page_first")
    one = open_backend(pool)
    fill(pool, 0, 0)
    one.batch_set_v1(["a"], slots(pool, 0))
    one.register_mem_pool_host(other)
    assert one.batch_get_v1(["a"], slots(other, 2)) == [True]
    with pytest.raises(LayoutMismatch, match="page_size_tokens 8 there, 4 here"):
        one.register_mem_pool_host(mha(page_size=8))


@pytest.mark.parametrize(
    ("keys", "where", "message"),
    [
        (["a", "b"], torch.arange(4), "4 slots for each of 2 pages, got 4"),
        (["a"], torch.arange(2, 6), "first slot of a page of 4 .* got 2"),
        (["a"], torch.arange(4) + 4 * pools.PAGES, f"host pool of {4 * pools.PAGES}, got {4 * pools.PAGES}"),
    ],
)
def test_slots_that_are_no_pages(open_backend: Open, keys: list[str], where: torch.Tensor, message: str) -> None:
    one = open_backend()
    for call in (one.batch_get_v1, one.batch_set_v1):
        with pytest.raises(InvalidInput, match=message):
            call(keys, where)


def test_tensors_that_are_no_pages(open_backend: Open) -> None:
    one = open_backend()
    for page in (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(PAGE_BYTES // 2, dtype=torch.float16)):
        with pytest.raises(LayoutMismatch, match=f"expected a page of {PAGE_BYTES // 2} elements torch.bfloat16"):
            one.set("a", page)
