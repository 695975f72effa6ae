"""What is resident, in what order it goes, who uses it, and what a failure leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.residency import Residency
from kvist.cartridge.room import ResidencyMetrics
from kvist.errors import (
    CartridgeTooLarge,
    DamagedCartridge,
    EngineError,
    InvalidInput,
    NotFound,
    ResidencyFull,
    UnknownCartridge,
)
from kvist.pager.sharding import rank_heads

from .making import make_cartridge


class Held:
    """A value; knows whether it was released."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.is_released = False


class Shelf:
    """Loads keys such as ``"a"`` of ten bytes, or ``"a30"`` of thirty, and counts."""

    def __init__(self, capacity: int = 30) -> None:
        self.loads: Counter[str] = Counter()
        self.released: list[str] = []
        self.damaged: set[str] = set()
        self.unloadable: set[str] = set()
        self.residency: Residency[Held] = Residency(capacity, self.load, self.size, self.release, check=self.check)

    def size(self, key: str) -> int:
        if key.startswith("?"):
            raise UnknownCartridge(key)
        return int(key.lstrip("abcdefghijklmnopqrstuvwxyz") or 10)

    def check(self, key: str) -> None:
        if key in self.damaged:
            raise DamagedCartridge(key)

    def load(self, key: str) -> Held:
        if key in self.unloadable:
            raise OSError(key)
        self.loads[key] += 1
        return Held(key)

    def release(self, held: Held) -> None:
        held.is_released = True
        self.released.append(held.key)

    def use(self, *keys: str) -> None:
        for key in keys:
            self.residency.acquire(key).close()

    @property
    def order(self) -> list[Hashable]:
        return self.residency.lru_order()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


# -- loading, and keeping ----------------------------------------------------------------------------------------


def test_the_first_acquire_loads_and_the_second_does_not(shelf: Shelf) -> None:
    with shelf.residency.acquire("a") as first, shelf.residency.acquire("a") as second:
        assert first.value is second.value
        assert shelf.residency.contains("a")
    assert shelf.loads == {"a": 1}
    metrics = shelf.residency.metrics()
    assert (metrics.misses, metrics.hits, metrics.loads) == (1, 1, 1)


def test_nothing_is_resident_until_it_is_asked_for(shelf: Shelf) -> None:
    assert (shelf.order, shelf.residency.resident_bytes, shelf.residency.refs("a")) == ([], 0, 0)
    assert not shelf.residency.contains("a")
    shelf.use("a")
    assert shelf.order == ["a"]


def test_only_what_was_served_is_resident_of_a_hundred() -> None:
    shelf = Shelf(capacity=1000)
    assert shelf.residency.metrics().resident == 0
    shelf.use("q")
    assert (shelf.residency.metrics().resident, shelf.residency.resident_bytes) == (1, 10)


def test_an_unknown_key_raises_what_the_loader_raises(shelf: Shelf) -> None:
    with pytest.raises(UnknownCartridge):
        shelf.residency.acquire("?")
    assert shelf.residency.metrics().failures == 1
    assert not shelf.residency.contains("?")


def test_keys_of_one_cartridge_in_two_dtypes_are_two_entries() -> None:
    sizes = {("a", "bfloat16"): 20, ("a", "float32"): 40, ("a", "k bfloat16, v float8"): 15}
    residency: Residency[object] = Residency(100, lambda key: key, sizes.__getitem__)
    for key in sizes:
        with residency.acquire(key) as lease:
            assert lease.value == key
    assert residency.resident_bytes == 75


def test_a_load_of_no_bytes_fits_anywhere() -> None:
    residency: Residency[str] = Residency(10, str, int)
    with residency.acquire(10), residency.acquire(0) as lease:
        assert lease.value == "0"


@pytest.mark.parametrize("capacity", [0, -1])
def test_there_is_room_for_something(capacity: int) -> None:
    with pytest.raises(InvalidInput, match=str(capacity)):
        Shelf(capacity)


def test_a_size_below_nothing_is_refused() -> None:
    residency: Residency[str] = Residency(10, str, lambda key: -1)
    with pytest.raises(InvalidInput, match="-1"):
        residency.acquire("a")


# -- leases ------------------------------------------------------------------------------------------------------


def test_as_many_closes_as_acquires(shelf: Shelf) -> None:
    first, second = shelf.residency.acquire("a"), shelf.residency.acquire("a")
    assert shelf.residency.refs("a") == 2
    first.close()
    assert (shelf.residency.refs("a"), shelf.residency.evict("a")) == (1, False)
    second.close()
    assert (shelf.residency.refs("a"), shelf.residency.evict("a")) == (0, True)


def test_closing_again_does_nothing(shelf: Shelf) -> None:
    first, second = shelf.residency.acquire("a"), shelf.residency.acquire("a")
    for _ in range(3):
        first.close()
    assert shelf.residency.refs("a") == 1
    assert not second.value.is_released


def test_a_closed_lease_has_no_value(shelf: Shelf) -> None:
    lease = shelf.residency.acquire("a")
    lease.close()
    with pytest.raises(EngineError, match="closed"):
        _ = lease.value


def test_a_lease_ends_with_an_error_in_its_block(shelf: Shelf) -> None:
    with pytest.raises(KeyError), shelf.residency.acquire("a"):
        raise KeyError
    assert shelf.residency.refs("a") == 0


# -- going -------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(shelf: Shelf) -> None:
    shelf.use("a", "b", "c")
    assert shelf.order == ["a", "b", "c"]
    shelf.use("a")
    assert shelf.order == ["b", "c", "a"]
    shelf.use("d")
    assert shelf.order == ["c", "a", "d"]
    assert shelf.released == ["b"]


def test_what_went_is_loaded_anew(shelf: Shelf) -> None:
    with shelf.residency.acquire("a") as lease:
        first = lease.value
    assert shelf.residency.evict("a")
    assert first.is_released
    with shelf.residency.acquire("a") as lease:
        assert lease.value is not first
    assert shelf.loads == {"a": 2}


def test_evicting_what_is_not_there_or_one_of_two(shelf: Shelf) -> None:
    shelf.use("a", "b")
    assert not shelf.residency.evict("c")
    assert shelf.residency.evict("a")
    assert not shelf.residency.evict("a")
    assert (shelf.order, shelf.residency.resident_bytes) == (["b"], 10)


def test_what_is_in_use_stays(shelf: Shelf) -> None:
    with shelf.residency.acquire("a"):
        shelf.use("b", "c", "d", "e")
        assert shelf.residency.contains("a")
        assert not shelf.residency.evict("a")
    assert shelf.released == ["b", "c"]


def test_what_is_pinned_stays(shelf: Shelf) -> None:
    shelf.use("a")
    assert shelf.residency.pin("a")
    shelf.use("b", "c", "d", "e")
    assert not shelf.residency.evict("a")
    assert shelf.residency.unpin("a")
    assert shelf.residency.evict("a")


def test_only_the_resident_can_be_pinned(shelf: Shelf) -> None:
    assert not shelf.residency.pin("a")
    assert not shelf.residency.unpin("a")
    shelf.use("a")
    assert shelf.residency.unpin("a")


def test_no_more_goes_than_has_to() -> None:
    shelf = Shelf(capacity=100)
    shelf.use("a1", "b60", "c30")
    shelf.use("d50")
    assert (shelf.released, shelf.order) == (["b60"], ["a1", "c30", "d50"])


def test_sizes_are_counted_to_the_byte() -> None:
    shelf = Shelf(capacity=100)
    for key, total in (("a7", 7), ("b13", 20), ("c80", 100)):
        shelf.use(key)
        assert shelf.residency.resident_bytes == total
    shelf.residency.evict("b13")
    assert shelf.residency.resident_bytes == 87


# -- by force ----------------------------------------------------------------------------------------------------


def test_by_force_the_unused_go_at_once_though_pinned(shelf: Shelf) -> None:
    shelf.use("a")
    shelf.residency.pin("a")
    assert shelf.residency.evict("a", force=True)
    assert (shelf.released, shelf.residency.resident_bytes) == (["a"], 0)


def test_by_force_who_uses_it_keeps_it_and_its_bytes_count(shelf: Shelf) -> None:
    old = shelf.residency.acquire("a")
    assert shelf.residency.evict("a", force=True)
    assert not shelf.residency.contains("a")
    assert (shelf.residency.resident_bytes, old.value.is_released) == (10, False)
    with shelf.residency.acquire("a") as new:
        assert new.value is not old.value
        assert shelf.residency.resident_bytes == 20
        value = old.value
        old.close()
        assert (value.is_released, new.value.is_released, shelf.residency.resident_bytes) == (True, False, 10)
    assert shelf.released == ["a"]


# -- no room -----------------------------------------------------------------------------------------------------


def unchanged(shelf: Shelf) -> tuple[object, ...]:
    metrics = shelf.residency.metrics()
    return shelf.order, list(shelf.released), metrics.resident_bytes, metrics.reserved_bytes, metrics.evictions


def test_what_is_larger_than_the_capacity_never_fits(shelf: Shelf) -> None:
    shelf.use("a")
    before = unchanged(shelf)
    with pytest.raises(ResidencyFull, match=r"capacity of 30 bytes, got 31"):
        shelf.residency.acquire("b31", wait=True)
    assert unchanged(shelf) == before
    assert shelf.residency.metrics().refusals == 1


def test_without_room_nothing_goes(shelf: Shelf) -> None:
    shelf.use("free")
    with shelf.residency.acquire("b"), shelf.residency.acquire("c"):
        before = unchanged(shelf)
        with pytest.raises(ResidencyFull, match="expected 20 bytes of 30 to be free or unused, got 10") as refused:
            shelf.residency.acquire("d20")
        assert unchanged(shelf) == before
        assert shelf.loads["d20"] == 0
    assert refused.value.hint
    shelf.use("d20")


def test_all_pinned_is_told_even_to_those_who_would_wait(shelf: Shelf) -> None:
    for key in "abc":
        shelf.use(key)
        shelf.residency.pin(key)
    before = unchanged(shelf)
    with pytest.raises(ResidencyFull, match="30 are pinned"):
        shelf.residency.acquire("d", wait=True)
    assert unchanged(shelf) == before


# -- failures ----------------------------------------------------------------------------------------------------


def test_what_fails_its_check_changes_nothing(shelf: Shelf) -> None:
    shelf.use("a", "b", "c")
    before = unchanged(shelf)
    shelf.damaged.add("d")
    for _ in range(2):
        with pytest.raises(DamagedCartridge):
            shelf.residency.acquire("d")
    assert unchanged(shelf) == before
    assert shelf.loads["d"] == 0
    shelf.damaged.clear()
    shelf.use("d")


def test_what_has_no_room_is_not_checked(shelf: Shelf) -> None:
    shelf.damaged.add("d31")
    with pytest.raises(ResidencyFull):
        shelf.residency.acquire("d31")


def test_a_load_that_fails_leaves_its_room_free(shelf: Shelf) -> None:
    shelf.use("a", "b", "c")
    shelf.unloadable.add("d")
    with pytest.raises(OSError, match="d"):
        shelf.residency.acquire("d")
    metrics = shelf.residency.metrics()
    assert (shelf.order, metrics.resident_bytes, metrics.reserved_bytes, metrics.failures) == (["b", "c"], 20, 0, 1)
    shelf.unloadable.clear()
    shelf.use("d")
    assert shelf.order == ["b", "c", "d"]


def test_a_release_that_fails_is_told_and_its_room_is_not_lost() -> None:
    def release(value: str) -> None:
        raise OSError(value)

    residency: Residency[str] = Residency(10, str, lambda key: 5, release)
    residency.acquire("a").close()
    residency.acquire("b").close()
    with pytest.raises(OSError, match=r"a|b"):
        Residency.acquire(residency, "c")
    assert residency.resident_bytes == 5
    residency.acquire("d").close()
    assert residency.metrics().reserved_bytes == 0


# -- ahead of time -----------------------------------------------------------------------------------------------


def test_prefetched_is_neither_used_nor_pinned_nor_a_miss(shelf: Shelf) -> None:
    assert shelf.residency.prefetch("a")
    assert shelf.residency.prefetch("a")
    assert (shelf.residency.refs("a"), shelf.loads["a"]) == (0, 1)
    shelf.use("a")
    metrics = shelf.residency.metrics()
    assert (metrics.hits, metrics.misses, metrics.loads) == (1, 0, 1)
    assert shelf.residency.evict("a")


def test_a_prefetch_respects_use_and_pins(shelf: Shelf) -> None:
    shelf.use("a")
    shelf.residency.pin("a")
    with shelf.residency.acquire("b20"):
        assert not shelf.residency.prefetch("c")
        assert not shelf.residency.prefetch("d31")
    assert shelf.residency.prefetch("c")
    assert shelf.order == ["a", "c"]


def test_a_prefetch_of_what_is_damaged_says_so(shelf: Shelf) -> None:
    shelf.damaged.add("a")
    with pytest.raises(DamagedCartridge):
        shelf.residency.prefetch("a")


# -- counting, and the end ---------------------------------------------------------------------------------------


def test_all_that_is_counted(shelf: Shelf) -> None:
    shelf.use("a", "b", "c", "a", "d")
    shelf.residency.pin("d")
    with shelf.residency.acquire("a"), shelf.residency.acquire("a"):
        assert shelf.residency.metrics() == ResidencyMetrics(
            hits=3,
            misses=4,
            waits=0,
            loads=4,
            failures=0,
            refusals=0,
            evictions=1,
            bytes_loaded=40,
            bytes_evicted=10,
            capacity_bytes=30,
            resident=3,
            resident_bytes=30,
            reserved_bytes=0,
            in_use=1,
            pinned=1,
        )


def test_closed(shelf: Shelf) -> None:
    shelf.use("a", "b")
    shelf.residency.pin("a")
    lease = shelf.residency.acquire("c")
    value = lease.value
    for _ in range(2):
        shelf.residency.close()
    assert (sorted(shelf.released), shelf.order, shelf.residency.resident_bytes) == (["a", "b"], [], 10)
    assert not value.is_released
    lease.close()
    assert value.is_released
    metrics = shelf.residency.metrics()
    assert metrics.bytes_loaded == metrics.bytes_evicted == 30
    for act in (shelf.residency.acquire, shelf.residency.prefetch):
        with pytest.raises(EngineError, match="closed"):
            act("a")


def test_cartridges_from_disk(tmp_path: Path) -> None:
    """What the residency is for: of each rank's heads, and each data type, its own entry; shapes may differ."""
    small, large = make_cartridge(16, cartridge_id="small"), make_cartridge(37, cartridge_id="large", seed=1)
    for made in (small, large):
        made.save_pretrained(tmp_path / made.manifest.cartridge_id)

    def load(key: tuple[str, str, int]) -> list[tuple[Tensor, Tensor]]:
        name, dtype, rank = key
        heads = rank_heads(2, 2, rank)
        with Cartridge.from_pretrained(tmp_path / name) as opened:
            layers = [opened.layer(index) for index in range(opened.num_layers)]
            return [
                tuple(half[:, heads.start : heads.stop].to(getattr(torch, dtype)) for half in one) for one in layers
            ]

    def size(key: tuple[str, str, int]) -> int:
        name, dtype, _ = key
        if name == "absent":
            raise NotFound(name)
        return {"small": 16, "large": 37}[name] * 3 * 2 * 8 * {"float32": 4, "bfloat16": 2}[dtype]

    residency: Residency[list[tuple[Tensor, Tensor]]] = Residency(31_000, load, size)
    for made in (small, large):
        for dtype in ("float32", "bfloat16"):
            for rank in range(2):
                with residency.acquire((made.manifest.cartridge_id, dtype, rank)) as lease:
                    assert sum(half.nbytes for layer in lease.value for half in layer) == size(
                        (made.manifest.cartridge_id, dtype, rank)
                    )
                    for index, halves in enumerate(lease.value):
                        for half, whole in zip(halves, made.layer(index), strict=True):
                            assert half.shape == (made.num_tokens, 1, 8)
                            assert torch.equal(half[:, 0], whole[:, rank].to(half.dtype))
    with pytest.raises(NotFound):
        residency.acquire(("absent", "float32", 0))
    assert residency.resident_bytes == 2 * 53 * 3 * 2 * 8 * 6


def test_a_lease_of_what_is_resident_loads_nothing(shelf: Shelf) -> None:
    assert shelf.residency.lease("a") is None
    shelf.residency.acquire("a").close()
    lease = shelf.residency.lease("a")
    assert lease is not None
    assert shelf.residency.refs("a") == 1
    lease.close()
    metrics = shelf.residency.metrics()
    assert (metrics.loads, metrics.hits, metrics.misses, metrics.in_use) == (1, 1, 1, 0)


def test_what_can_never_fit_is_told_apart(shelf: Shelf) -> None:
    with pytest.raises(CartridgeTooLarge) as raised:
        shelf.residency.acquire("d31")
    assert raised.value.hint == "host_bytes of at least 31 would hold it"
