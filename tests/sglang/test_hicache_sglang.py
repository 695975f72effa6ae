"""The backend as SGLang handles one: made by its factory, wrapped, beside its file backend, as its tests ask."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hicache_pools as pools
import pytest
import torch
from hicache_pools import DIM, HEADS, LAYERS, config, fill, mha, mla, read, slots
from hicache_real import HAS_SGLANG, load

from kvist.engines.sglang.hicache import KvistHiCache
from kvist.errors import InvalidInput

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="sglang is not installed here: make test-sglang")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"{(tmp_path / 'store').as_uri()}?durable=0"


@pytest.fixture
def factory() -> Any:
    return load("mem_cache.storage.backend_factory").StorageBackendFactory


def attach(factory: Any, pool: Any, storage_config: Any) -> Any:
    """As ``HiCacheController.attach_storage_backend`` of 0.5.23 does."""
    backend = factory.create_backend("dynamic", storage_config, pool)
    backend.register_mem_pool_host(pool)
    backend.register_mem_host_pool_v2(pool, load("mem_cache.hicache_storage").PoolName.KV)
    backend.on_host_pools_registered()
    return backend


@pytest.fixture
def close() -> Iterator[list[Any]]:
    """Closes what a test puts into it."""
    made: list[Any] = []
    yield made
    for each in made:
        each.close()


def test_it_is_what_the_factory_makes(factory: Any, url: str, close: list[Any]) -> None:
    pool = mha()
    backend = attach(factory, pool, config(url))
    close.append(backend)
    assert type(backend) is KvistHiCache
    assert isinstance(backend, load("mem_cache.hicache_storage").HiCacheStorage)
    with pytest.raises(InvalidInput, match="got stor"):
        factory.create_backend("dynamic", config(url, extra={"stor": "x"}), pool)


def test_calls_that_fail_at_random_give_a_miss_or_the_page(
    factory: Any, url: str, close: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.4")
    pool = mha()
    backend = attach(factory, pool, config(url))
    close.append(backend)
    assert type(backend).__name__ == "HiCacheStorageFailureInjector"
    wrote = {f"k{page}": fill(pool, page, page) for page in range(8)}
    read_ones = 0
    for turn in range(100):
        page = turn % 8
        backend.batch_set_v1([f"k{page}"], slots(pool, page))
        (is_read,) = backend.batch_get_v1([f"k{page}"], slots(pool, 10))
        if is_read:
            read_ones += 1
            assert torch.equal(read(pool, 10), wrote[f"k{page}"])
    assert 0 < read_ones < 100


@pytest.mark.parametrize(("make", "tp_rank", "tp_size"), [(mha, 0, 1), (mla, 0, 1), (mha, 1, 4), (mla, 3, 8)])
def test_batches_as_the_tests_of_its_backends_ask(
    factory: Any, url: str, close: list[Any], make: Any, tp_rank: int, tp_size: int
) -> None:
    """Those of Mooncake, SiMM and EIC: a batch of 13 stored, found and read back, for these ranks."""
    pool = make("page_first")
    backend = attach(factory, pool, config(url, is_mla=make is mla, tp_rank=tp_rank, tp_size=tp_size))
    close.append(backend)
    count = 11
    keys = [f"test_{number}" for number in range(count)]
    wrote = [fill(pool, page, page) for page in range(count)]
    assert backend.batch_exists(keys) == 0
    assert all(backend.batch_set_v1(keys, slots(pool, *range(count))))
    assert backend.batch_exists(keys) == count
    assert all(backend.batch_get_v1(keys, slots(pool, *range(count, 2 * count))))
    assert all(torch.equal(read(pool, count + page), wrote[page]) for page in range(count))
    assert backend.set("single", wrote[0])
    assert backend.exists("single")


@pytest.mark.parametrize("page_size", [1, 2])
def test_pages_as_the_test_of_aibrix_asks(factory: Any, url: str, close: list[Any], page_size: int) -> None:
    """64 layers of float16; tensors in their shape; the whole batch, and the last half of it."""
    memory_pool, host = load("mem_cache.memory_pool"), load("mem_cache.pool_host.mha")
    device = memory_pool.MHATokenToKVPool(1024, page_size, torch.float16, 1, 128, 64, "cpu", False)
    pool = host.MHATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info,
        2,
        0,
        page_size,
        "layer_first",
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=device.start_layer,
        end_layer=device.end_layer,
    )
    backend = attach(factory, pool, config(url, model_name="test"))
    close.append(backend)
    shape = (2, 64, page_size, 1, 128)
    wrote = [torch.rand(shape, dtype=torch.float16) for _ in range(4)]
    keys = [f"hash{number}" for number in range(4)]
    assert backend.batch_exists(keys) == 0
    assert backend.batch_set(keys, wrote)
    for first in (0, 2):
        ready = [torch.rand(shape, dtype=torch.float16).flatten() for _ in range(4 - first)]
        backend.batch_get(keys[first:], ready)
        assert all(torch.equal(page, wrote[first + place].flatten()) for place, page in enumerate(ready))
        assert backend.batch_exists(keys[first:]) == 4 - first


@pytest.mark.parametrize("make", [mha, mla])
def test_it_answers_as_the_file_backend_does(
    factory: Any, url: str, close: list[Any], tmp_path: Path, make: Any
) -> None:
    """SGLang's own ``HiCacheFile``, asked the same in any order."""
    pool = make("page_first")
    ours = attach(factory, pool, config(url, is_mla=make is mla))
    close.append(ours)
    of_file = config(url, is_mla=make is mla)
    of_file.extra_config = {"file_storage_path": str(tmp_path / "files")}
    theirs = load("mem_cache.hicache_storage").HiCacheFile(of_file)
    draw = random.Random(3)
    keys = [f"{number:064x}" for number in range(12)]
    for turn in range(300):
        some = draw.sample(keys, draw.randrange(1, 6))
        match draw.randrange(4):
            case 0:
                pages = [fill(pool, draw.randrange(pools.PAGES), turn * 10 + place) for place in range(len(some))]
                new = [(key, page) for key, page in zip(some, pages, strict=True) if not theirs.exists(key)]
                chosen, values = [key for key, _ in new], [page for _, page in new]
                assert ours.batch_set(chosen, values) == theirs.batch_set(chosen, values)
            case 1:
                assert ours.batch_exists(some) == theirs.batch_exists(some)
            case 2:
                got = ours.batch_get(some, [pool.get_dummy_flat_data_page() for _ in some])
                want = theirs.batch_get(some, [pool.get_dummy_flat_data_page() for _ in some])
                for mine, other in zip(got, want, strict=True):
                    assert (mine is None) == (other is None)
                    assert mine is None or torch.equal(mine, other)
            case _ if turn % 20 == 19:
                assert ours.clear() == theirs.clear()
            case _:
                assert [ours.exists(key) for key in some] == [theirs.exists(key) for key in some]


def test_the_stand_ins_are_like_the_pools() -> None:
    """What `hicache_pools` says of SGLang's pools where it is not installed."""
    for make in (mha, mla):
        pool = make("page_first_direct")
        assert pool.layer_num == pool.target_layer_num == LAYERS
        assert (pool.start_layer, pool.dcp_size, pool.page_size) == (0, 1, 4)
        assert pool.size == pools.PAGES * 4
    assert (mha().head_num, mha().head_dim) == (HEADS, DIM)
    assert mla().kv_cache_dim == pools.LATENT
