"""The plugin by itself: LMCache is not needed to import it, nor to use it by hand."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from no_lmcache import CHUNK, DIM, HEADS, LAYERS, Key, LayerKey, Memory, chunk_of, plugin

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.model import ModelIdentity
from kvist.engines.lmcache import KvistStorage
from kvist.engines.lmcache.settings import Settings
from kvist.errors import DamagedPage, InvalidInput

Open = Callable[..., KvistStorage]
PREFIX = "storage_plugin.x."
OURS = {PREFIX + "module_path": "kvist.engines.lmcache", PREFIX + "class_name": "KvistStorage"}


@pytest.fixture
def opened(url: str) -> Iterator[Open]:
    """Opens the plugin over the store; closed at the end."""
    made: list[KvistStorage] = []

    def make(memory: Memory | None = None, **options: Any) -> KvistStorage:
        made.append(plugin(url, memory if memory is not None else Memory(), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def put(found: KvistStorage, key: Any, seed: int, tokens: int = CHUNK) -> torch.Tensor:
    chunk = chunk_of(seed, tokens)
    (future,) = found.batched_submit_put_task([key], [chunk]) or [None]
    assert future is not None
    future.result()
    assert chunk.refs == 1
    return chunk.tensor.clone()


# -- importing and configuring ---------------------------------------------------------------------------------------


def test_importing_needs_neither_lmcache_nor_torch() -> None:
    code = (
        "import sys; sys.modules['lmcache'] = None\n"
        "import kvist.engines.lmcache\n"
        "assert 'torch' not in sys.modules\n"
        "from kvist.engines.lmcache import KvistStorage\n"
        "print(KvistStorage.__mro__[1].__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "kvist.engines.lmcache.host"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "store is missing"),
        ({"store": ""}, "url or path"),
        ({"store": "x", "registry_db": "y"}, "got registry_db"),
        ({"store": "x", "max_bytes": "10GB"}, "max_bytes must be"),
        ({"store": "x", "max_bytes": True}, "max_bytes must be"),
        ({"store": "x", "policy": "best"}, "policy must be one of"),
        ({"store": "x", "refresh_s": -1}, "refresh_s must be"),
        ({"store": "x", "cartridges": "all"}, "cartridges must be"),
        ({"store": "x", "revision": ""}, "revision must be"),
    ],
)
def test_settings_that_cannot_be_right(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Settings.of_config(OURS | {PREFIX + key: value for key, value in extra.items()}, ["x"], KvistStorage)


def test_the_plugins_name_is_found_by_its_class() -> None:
    extra = {"storage_plugin.a.class_name": "Other", **OURS, PREFIX + "store": "memory:"}
    assert Settings.of_config(extra, ["a", "x"], KvistStorage).store == "memory:"
    for plugins in ([], None, ["a"]):
        with pytest.raises(InvalidInput, match="expected one plugin"):
            Settings.of_config(extra, plugins, KvistStorage)
    twice = extra | {key.replace(".x.", ".y."): value for key, value in OURS.items()}
    with pytest.raises(InvalidInput, match="expected one plugin"):
        Settings.of_config(twice, ["x", "y"], KvistStorage)


def test_a_chunk_that_cannot_fit_is_said_at_once(opened: Open) -> None:
    with pytest.raises(InvalidInput, match="a chunk has 384 bytes"):
        opened(max_bytes=100)


# -- one chunk -------------------------------------------------------------------------------------------------------


def test_nothing_is_there_at_first(opened: Open) -> None:
    found, key = opened(), Key()
    assert not found.contains(key)
    assert not found.exists_in_put_tasks(key)
    assert found.get_blocking(key) is None
    assert not found.pin(key)
    assert not found.unpin(key)
    assert not found.remove(key)
    assert found.clear() == 0
    assert found.batched_contains([key, key]) == 0
    found.touch_cache()


@pytest.mark.parametrize("tokens", [CHUNK, CHUNK - 1, 1])
def test_what_is_put_comes_back(opened: Open, tokens: int) -> None:
    found = opened(memory := Memory())
    kv = put(found, Key(), 1, tokens)
    assert found.contains(Key())
    got = found.get_blocking(Key())
    assert got.tensor.shape == kv.shape
    assert torch.equal(got.tensor, kv)
    assert [chunk.refs for chunk in memory.given] == [1]
    found.close()
    again = opened()
    assert torch.equal(again.get_blocking(Key()).tensor, kv)


def test_a_put_is_a_copy(opened: Open) -> None:
    found, chunk = opened(), chunk_of(1)
    kv = chunk.tensor.clone()
    found.batched_submit_put_task([Key()], [chunk])
    chunk.tensor.zero_()
    found.chunks.flush()
    assert torch.equal(found.get_blocking(Key()).tensor, kv)


def test_what_is_there_is_not_put_again(opened: Open) -> None:
    found = opened()
    kv = put(found, Key(), 1)
    assert found.batched_submit_put_task([Key(), Key()], [chunk_of(2), chunk_of(3)])[0].result() == 0
    assert torch.equal(found.get_blocking(Key()).tensor, kv)


def test_a_batch_has_none_where_nothing_is(opened: Open) -> None:
    found = opened()
    a, b = put(found, Key(1), 1), put(found, Key(3), 2, 2)
    got = found.batched_get_blocking([Key(1), Key(2), Key(3)])
    assert got[1] is None
    assert torch.equal(got[0].tensor, a)
    assert torch.equal(got[2].tensor, b)
    assert found.batched_contains([Key(1), Key(2), Key(3)]) == 1


def test_without_memory_for_it_a_chunk_is_a_miss(opened: Open) -> None:
    found = opened(memory := Memory(room=1))
    put(found, Key(1), 1)
    put(found, Key(2), 2, 2)
    got = found.batched_get_blocking([Key(1), Key(2)])
    assert got[0] is not None
    assert got[1] is None
    got[0].ref_count_down()
    assert found.get_blocking(Key(2)) is not None
    assert [chunk.refs for chunk in memory.given] == [0, 1]


def test_a_scheduler_only_looks(opened: Open, url: str) -> None:
    put(opened(), Key(), 1)
    scheduler = plugin(url, None)
    try:
        assert scheduler.contains(Key())
        assert scheduler.get_blocking(Key()) is None
        assert scheduler.get_allocator_backend() is None
    finally:
        scheduler.close()


def test_removal_keeps_what_was_read(opened: Open) -> None:
    found = opened()
    kv = put(found, Key(), 1)
    got = found.get_blocking(Key())
    assert found.pin(Key())
    assert not found.remove(Key(), force=False)
    assert found.contains(Key())
    assert found.remove(Key())
    assert not found.remove(Key())
    assert not found.contains(Key())
    assert found.get_blocking(Key()) is None
    assert torch.equal(got.tensor, kv)
    found.chunks.flush()
    kv = put(found, Key(), 2)
    assert torch.equal(found.get_blocking(Key()).tensor, kv)


def test_removal_reaches_what_is_still_on_its_way(opened: Open) -> None:
    found = opened()
    found.batched_submit_put_task([Key()], [chunk_of(1)])
    assert found.remove(Key())
    found.chunks.flush()
    assert not found.contains(Key())


def test_close_is_final_and_idempotent(opened: Open) -> None:
    found = opened()
    found.close()
    found.close()
    assert found.batched_submit_put_task([Key()], [chunk_of(1)])[0].result() == 0
    assert found.chunks.metrics.dropped == 1


def test_staging_is_bounded(opened: Open) -> None:
    found = opened(staging_bytes=2 * 384)
    keys = [Key(i) for i in range(20)]
    future = found.batched_submit_put_task(keys, [chunk_of(i) for i in range(20)])[0]
    assert future.result() == 2
    assert found.chunks.metrics.dropped == 18
    assert found.batched_contains(keys) == 2


def test_a_lookup_of_layers_that_cannot_be_kept_is_an_error(opened: Open) -> None:
    found = opened(memory := Memory())
    put(found, Key(1), 1)
    with pytest.raises(DamagedPage, match="expected 2 chunks"):
        asyncio.run(found.batched_get_non_blocking("fake_lookup_id", [Key(1), Key(2)]))
    assert len(asyncio.run(found.batched_get_non_blocking("r", [Key(1), Key(2)]))) == 1
    assert [chunk.refs for chunk in memory.given] == [0, 1]


# -- cartridges ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cartridge(tmp_path: Path) -> Cartridge:
    """Trained, as it seems: 6 tokens, and no ids."""
    generator = torch.Generator().manual_seed(3)
    layers = [
        tuple(torch.randn(6, HEADS, DIM, generator=generator).to(torch.bfloat16) for _ in "kv") for _ in range(LAYERS)
    ]
    model = ModelIdentity(model_id="org/model", num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype="bfloat16")
    made = Cartridge.create(layers, model, cartridge_id="trained")  # type: ignore[arg-type]
    made.save_pretrained(tmp_path / "trained")
    return made


def of_layer(layer: Any, name: str = "trained") -> Key:
    return Key(0, (("cartridge", name), ("layer", layer)))


@pytest.fixture
def with_cartridge(opened: Open, cartridge: Cartridge) -> Open:
    """Opens the plugin with the cartridge."""
    source = {"cartridges": [{"cartridge_id": "trained", "path": str(cartridge.directory)}]}
    return lambda **options: opened(cartridges=source, **options)


def test_layers_of_a_cartridge(with_cartridge: Open, cartridge: Cartridge) -> None:
    found = with_cartridge()
    for layer in range(LAYERS):
        for key in (of_layer(layer), of_layer(str(layer))):
            assert found.contains(key, pin=True)
            got = found.get_blocking(key)
            assert got.tensor.shape == (2, 6, HEADS * DIM)
            for half, whole in zip(got.tensor, cartridge.layer(layer), strict=True):
                assert torch.equal(half, whole.flatten(1))
    assert not found.chunks.pins.held()


@pytest.mark.parametrize(
    "key",
    [
        of_layer(LAYERS),
        of_layer("two"),
        of_layer("-1"),
        of_layer(0, "other"),
        of_layer(0, ""),
        Key(0, (("layer", "0"),)),
        Key(0, (("cartridge", "trained"),)),  # not a chunk of it: it has no document to hash
        LayerKey(0, (("cartridge", "other"),)),
    ],
)
def test_keys_that_name_no_part_of_a_cartridge_are_misses(with_cartridge: Open, key: Key) -> None:
    found = with_cartridge()
    assert not found.contains(key)
    assert found.get_blocking(key) is None
    assert not found.pin(key)
    assert not found.remove(key)


def test_without_cartridges_such_keys_are_misses(opened: Open) -> None:
    found, key = opened(), Key(1, (("cartridge", "trained"),))
    assert found.batched_submit_put_task([key], [chunk_of(1)]) is None
    assert not found.contains(key)
    assert not found.contains(of_layer(0))


def test_removing_what_was_read_does_not_remove_the_cartridge(with_cartridge: Open) -> None:
    found = with_cartridge()
    assert not found.remove(of_layer(0))
    assert found.contains(of_layer(0))


def test_a_damaged_cartridge_is_a_miss(with_cartridge: Open, cartridge: Cartridge) -> None:
    assert cartridge.directory is not None
    (shard,) = cartridge.directory.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    found = with_cartridge()
    shard.chmod(0o600)
    shard.write_bytes(data)
    assert found.get_blocking(of_layer(0)) is None
    assert not found.contains(of_layer(0))


@pytest.mark.parametrize(
    "differs",
    [
        {"model_id": "org/other"},
        {"revision": "there"},
        {"dtype": "float16"},
        {"num_layers": LAYERS + 1},
        {"num_kv_heads": HEADS + 1},
        {"head_dim": DIM + 1},
        {"first_position": 1},
    ],
)
def test_a_cartridge_that_does_not_fit_is_a_miss(opened: Open, tmp_path: Path, differs: dict[str, Any]) -> None:
    shape = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "dtype": "bfloat16"} | differs
    position = shape.pop("first_position", 0)
    model = ModelIdentity(**{"model_id": "org/model"} | shape)
    tensor = torch.zeros(6, model.num_kv_heads, model.head_dim, dtype=getattr(torch, model.dtype))
    layers = [(tensor, tensor)] * model.num_layers
    made = Cartridge.create(layers, model, cartridge_id="c", first_position=position)
    made.save_pretrained(tmp_path / "c")
    source = {"cartridges": [{"cartridge_id": "c", "path": str(tmp_path / "c")}]}
    found = opened(cartridges=source, revision="here")
    assert not found.contains(of_layer(0, "c"))
    assert found.get_blocking(of_layer(0, "c")) is None


def test_chunks_behind_a_cartridge_are_kept_by_its_content(with_cartridge: Open, opened: Open) -> None:
    key = Key(5, (("cartridge", "trained"),))
    found = with_cartridge()
    kv = put(found, key, 1)
    assert torch.equal(found.get_blocking(key).tensor, kv)
    assert not found.contains(Key(5))
    found.close()
    assert not opened().contains(key)  # what the id stands for is not known
    again = with_cartridge()
    assert torch.equal(again.get_blocking(key).tensor, kv)
