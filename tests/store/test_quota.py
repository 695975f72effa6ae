"""Quotas: what is refused, what always passes, and that threads together never exceed one."""

import threading
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput, StoreFull
from kvist.store import Match, MemoryStore, Quota, QuotaStore, Store
from kvist.store.quota import Use, making_room, measure
from kvist.testing.store import StoreTests


class TestQuotaStore(StoreTests):
    """A quota that is never reached changes nothing."""

    def make_store(self, tmp_path: Path) -> Store:
        return QuotaStore(MemoryStore(), Quota(2**40, 2**40))

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, QuotaStore)
        return QuotaStore(store.store, store.quota)


def limited(max_bytes: int | None = None, max_snapshots: int | None = None) -> QuotaStore:
    return QuotaStore(MemoryStore(), Quota(max_bytes, max_snapshots))


def test_refuses_what_exceeds_it_and_says_the_numbers() -> None:
    store = limited(10)
    store.put("manifests/a", b"12345678")
    with pytest.raises(StoreFull, match="8 bytes are used, 3 more were asked for, the limit is 10") as refused:
        store.put("manifests/b", b"123")
    assert refused.value.hint == "delete branches, then run kvist gc"
    with pytest.raises(StoreFull):
        store.put_many([("manifests/b", b"1"), ("manifests/c", b"23")], mode="create")
    store.put_many([("manifests/b", b"1"), ("manifests/c", b"2")], mode="create")
    assert measure(store.store) == Use(10, 0)
    store.put_many([("manifests/b", b"1")], mode="create")  # it is there


def test_a_writer_leaves_nothing_when_it_exceeds_it() -> None:
    store = limited(100)
    with store.writer("segments/a") as writer:
        writer.write(b"x" * 60)
        with pytest.raises(StoreFull), store.writer("segments/b") as other:
            other.write(b"x" * 41)
        with store.writer("segments/c") as other:
            other.write(b"x" * 40)
            other.commit()
        writer.commit()
    assert [info.key for info in store.list()] == ["segments/a", "segments/c"]
    with pytest.raises(StoreFull):
        store.put("manifests/a", b"x")


def test_what_a_writer_gives_up_is_free_again() -> None:
    store = limited(10)
    with store.writer("segments/a") as writer:
        writer.write(b"1234567890")
    store.put("manifests/a", b"1234567890")


def test_at_the_limit_deletes_replacements_and_order_pass() -> None:
    store = limited(10)
    etag = store.put("refs/branches/a.ref", b"1234567890")
    store.put("refs/branches/a.ref", b"12345678901", mode=Match(etag))
    store.put("refs/branches/a.ref", b"123456789012")  # a damaged record is healed so
    for free in ("locks/gc", "leases/a", "damaged/a/b", "pruned/a"):
        store.put(free, b"x", mode="create")
    with pytest.raises(StoreFull):
        store.put("manifests/a", b"x")
    with making_room():
        store.put("manifests/a", b"x")
        with store.writer("segments/a") as writer:
            writer.write(b"x" * 100)
            writer.commit()
    with pytest.raises(StoreFull):
        store.put("manifests/b", b"x")
    store.delete([info.key for info in store.list()])
    store.put("manifests/b", b"x" * 10)  # what was freed counts at once


def test_counts_snapshots() -> None:
    store = limited(max_snapshots=2)
    store.put("snapshots/a", b"x" * 1000)
    store.put("snapshots/a", b"x" * 1000)
    with pytest.raises(StoreFull, match="it has 1 snapshots, 2 more were asked for, the limit is 2"):
        store.put_many([("snapshots/b", b"x"), ("snapshots/c", b"x")], mode="create")
    store.put_many([("snapshots/a", b"x"), ("snapshots/b", b"x")], mode="create")
    store.put("manifests/a", b"x")


def test_other_repositories_in_it_do_not_count() -> None:
    store = limited(10)
    store.store.put("tenants/a/segments/b", b"x" * 1000)
    store.put("manifests/a", b"1234567890")
    assert store.use() == Use(10, 0)


def test_sees_what_another_process_put_when_it_measures() -> None:
    store, below = limited(100), None
    below = store.store
    store.put("manifests/a", b"x" * 10)
    below.put("segments/of-another", b"x" * 80)
    with pytest.raises(StoreFull, match="90 bytes are used"), store.writer("segments/a") as writer:
        writer.write(b"x" * 11)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "1", 2**63])
def test_a_quota_is_a_whole_number(wrong: object) -> None:
    with pytest.raises(InvalidInput, match="max_bytes"):
        Quota(wrong)  # type: ignore[arg-type]


def test_threads_together_never_exceed_it() -> None:
    store = limited(5_000)
    failed = []

    def fill(number: int) -> None:
        for turn in range(40):
            try:
                if turn % 3:
                    store.put(f"manifests/{number}-{turn}", b"x" * 37)
                else:
                    with store.writer(f"segments/{number}-{turn}") as writer:
                        writer.write(b"x" * 50)
                        writer.write(b"x" * 50)
                        writer.commit()
                if turn % 7 == 0:
                    store.delete([f"segments/{number}-{turn}"])
            except StoreFull:
                failed.append(number)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed
    assert measure(store.store).bytes <= 5_000


_KEYS = st.sampled_from([f"{kind}/{name}" for kind in ("segments", "manifests", "snapshots") for name in "abcd"])
_ACTS = st.tuples(st.sampled_from(["create", "overwrite", "write", "give_up", "delete"]), _KEYS, st.integers(0, 40))


@given(st.integers(0, 120), st.integers(0, 3), st.lists(_ACTS, max_size=30))
def test_one_process_never_exceeds_it_and_is_never_refused_what_fits(
    most: int, snapshots: int, acts: list[tuple[str, str, int]]
) -> None:
    store = limited(most, snapshots)
    for act, key, size in acts:
        before, old = measure(store.store), store.head(key)
        try:
            match act:
                case "delete":
                    store.delete([key])
                case "write" | "give_up" if old is None and not key.startswith("snapshots/"):
                    with store.writer(key) as writer:
                        writer.write(b"x" * size)
                        if act == "write":
                            writer.commit()
                case "create" | "overwrite":
                    mode: Literal["create", "overwrite"] = "create" if act == "create" else "overwrite"
                    store.put_many([(key, b"x" * size)], mode=mode)
        except StoreFull:
            is_full = before.bytes + size > most
            assert old is None
            assert is_full or (key.startswith("snapshots/") and before.snapshots + 1 > snapshots)
            assert measure(store.store) == before
        else:
            now = measure(store.store)
            assert now.bytes <= most or now.bytes <= before.bytes or old is not None
            assert now.snapshots <= max(snapshots, before.snapshots)
