"""Transfers while others write, collect garbage, or pull the plug."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvist.errors import (
    Conflict,
    IntegrityError,
    NotFound,
    StoreError,
    StoreFull,
)
from kvist.repo import RefKind, Repository, fsck, gc, lease, lock, transfer
from kvist.repo.objects import snapshot_key
from kvist.store import LocalStore, MemoryStore, ReadOnlyStore, Store, WrapperStore
from kvist.testing.faults import CrashingStore, SimulatedCrash

from .making import halves, read_back, snapshot
from .transferring import HALF, move, names, require_same


def test_a_branch_that_moves_meanwhile(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(1))
    plan = transfer.plan(repo, target, ["main"])
    theirs = snapshot(target, halves(1, 5))
    with pytest.raises(Conflict):
        transfer.apply(repo, target, plan)
    assert names(target) == {(RefKind.BRANCH, "main"): theirs.cid}
    assert not [*target.store.list(lease.PREFIX)]


def test_a_gc_between_plan_and_apply(repo: Repository, target: Repository) -> None:
    """What lay at the target when it was planned is gone: pages come anew, a snapshot relied upon is missed."""
    snapshot(repo, halves(3))
    target.put_pages(halves(2))
    plan = transfer.plan(repo, target, ["main"])
    assert len(plan.lacking.pages) == 2
    gc.apply(target, gc.plan(target, min_age=0))
    assert transfer.apply(repo, target, plan).pages == 6
    require_same(repo, target)
    snapshot(repo, halves(3) + halves(1, 1))
    plan = transfer.plan(repo, target, ["main"])
    target.delete_ref(RefKind.BRANCH, "main")
    gc.apply(target, gc.plan(target, min_age=0))
    with pytest.raises(Conflict):
        transfer.apply(repo, target, plan)
    move(repo, target)
    require_same(repo, target)


class Interrupting(WrapperStore):
    """Calls ``act`` right after each write of a key below ``prefix``."""

    def __init__(self, store: Store, prefix: str, act: Callable[[], object]) -> None:
        super().__init__(store)
        self.prefix, self.act, self.calls = prefix, act, 0

    def put(self, key, data, *, mode="overwrite"):  # type: ignore[no-untyped-def]
        etag = super().put(key, data, mode=mode)
        self._tell(key)
        return etag

    def put_many(self, items, *, mode):  # type: ignore[no-untyped-def]
        super().put_many(items, mode=mode)
        if items:
            self._tell(items[0][0])

    def _tell(self, key: str) -> None:
        if key.startswith(self.prefix):
            self.calls += 1
            self.act()


@pytest.mark.parametrize("prefix", ["leases/", "manifests/", "snapshots/", "refs/"])
@pytest.mark.parametrize("min_age", [0, 60])
def test_a_gc_in_the_middle(repo: Repository, target: Repository, prefix: str, min_age: int) -> None:
    """The lease keeps what has arrived, of whatever age a gc would otherwise take it."""
    for i in range(3):
        snapshot(repo, halves(2, i))
    target.put_pages(halves(2, 1))  # garbage that will be relied upon
    with Repository.open(target.store) as collector:

        def collect() -> None:
            gc.apply(collector, gc.plan(collector, min_age=min_age))

        interrupting = Interrupting(target.store, prefix, collect)
        with Repository.open(interrupting) as seen:
            plan = transfer.plan(repo, seen, everything=True)
            transfer.apply(repo, seen, plan, batch_bytes=2 * HALF)
            assert interrupting.calls
    require_same(repo, target)


def test_a_gc_of_the_source_in_the_middle(repo: Repository, target: Repository) -> None:
    """The branch is deleted and collected while it is read: the lease keeps it."""
    made = snapshot(repo, halves(6))
    plan = transfer.plan(repo, target, ["main"])
    with Repository.open(repo.store) as other:

        def collect() -> None:
            if names(other):
                other.delete_ref(RefKind.BRANCH, "main")
            gc.apply(other, gc.plan(other, min_age=0))

        with Repository.open(Interrupting(target.store, "manifests/", collect)) as seen:
            transfer.apply(repo, seen, plan, batch_bytes=HALF)
    assert read_back(target, made.cid) == halves(6)
    gc.apply(repo, gc.plan(repo, min_age=0))
    assert not [*repo.objects.snapshots()], "the lease is given back"


def test_the_leases_on_both_sides_are_renewed(
    repo: Repository, target: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer may take longer than a lease holds."""
    for i in range(3):
        snapshot(repo, halves(2, i))
    renewed: collections.Counter[str] = collections.Counter()
    real = lease.Lease.renew

    def renew(self: lease.Lease) -> None:
        renewed[self._repo.store.url] += 1
        real(self)

    monkeypatch.setattr(lease.Lease, "renew", renew)
    transfer.apply(repo, target, transfer.plan(repo, target, everything=True), batch_bytes=HALF)
    assert set(renewed.values()) == {14}, "after the manifests, each of twelve pages, and the snapshots"
    assert renewed.keys() == {repo.store.url, target.store.url}


def test_a_source_that_takes_no_lease(repo: Repository, target: Repository, caplog: pytest.LogCaptureFixture) -> None:
    """It is read all the same; that a gc may hinder it is said aloud only where it could have been otherwise."""

    class Refusing(WrapperStore):
        def put(self, key, data, *, mode="overwrite"):  # type: ignore[no-untyped-def]
            raise StoreError("no route to host")

    snapshot(repo, halves(2))
    for store in (ReadOnlyStore(repo.store), Refusing(repo.store)):
        assert "without a lease" not in caplog.text
        with Repository.open(store) as source:
            move(source, target)
        require_same(repo, target)
        snapshot(repo, halves(1, 1))
    assert "without a lease" in caplog.text


def test_what_a_running_gc_condemns_is_sent_anew(repo: Repository, target: Repository) -> None:
    data = halves(2)
    snapshot(repo, data)
    old = snapshot(target, data, None)
    (segment,) = [one.key for one in target.pages.segments()]
    doomed = lock.Condemned(objects=frozenset({snapshot_key(old.cid)}), segments=frozenset({segment}))
    etag = lock.acquire(target.store, doomed)
    assert move(repo, target).pages == 4
    target.store.delete([snapshot_key(old.cid), segment])
    lock.release(target.store, etag)
    with Repository.open(target.store) as reopened:
        require_same(repo, reopened)


# -- interruptions ---------------------------------------------------------------------------------------------------


def test_a_crash_at_every_write_is_gone_on_from(repo: Repository) -> None:
    """Whatever write it dies at, the target is whole, and the next try sends only what had not arrived."""
    snapshot(repo, halves(3))
    snapshot(repo, halves(3) + halves(1, 1))
    repo.tag("v1", "main")
    total = 8 * HALF
    resumed = set()
    for at in range(1, 100):
        store = MemoryStore()
        Repository.init(store).close()
        crashing = CrashingStore(store, at, after=at % 2 == 0)
        with Repository.open(crashing) as seen:
            try:
                transfer.apply(repo, seen, transfer.plan(repo, seen, everything=True), batch_bytes=2 * HALF)
            except SimulatedCrash:
                pass
            else:
                break
        with Repository.open(store) as target:
            report = fsck.check(target)
            assert report.is_clean, report.findings
            arrived = sum(segment.data_bytes for segment in target.pages.segments())
            done = move(repo, target)
            assert done.page_bytes == total - arrived
            resumed.add(done.page_bytes)
            assert names(target) == names(repo)
            target.store.delete([info.key for info in target.store.list(lease.PREFIX)])  # that of the dead runs out
            require_same(repo, target)
    else:
        raise AssertionError("it never got through")
    assert resumed == {total - i * 2 * HALF for i in range(5)}


class FullStore(WrapperStore):
    """Takes no more than two segments."""

    def writer(self, key: str):  # type: ignore[no-untyped-def]
        if len([*self.store.list("segments/")]) >= 2:
            raise StoreFull("no space left")
        return super().writer(key)


def test_a_full_target(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(3))
    with Repository.open(FullStore(target.store)) as full, pytest.raises(StoreFull):
        transfer.apply(repo, full, transfer.plan(repo, full, everything=True), batch_bytes=2 * HALF)
    assert names(target) == {} and fsck.check(target).is_clean
    assert move(repo, target).pages == 2, "two batches of two had arrived"
    require_same(repo, target)


def test_a_target_that_takes_nothing(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(1))
    with Repository.open(ReadOnlyStore(target.store)) as seen:
        plan = transfer.plan(repo, seen, everything=True)
        with pytest.raises(StoreError, match="read only"):
            transfer.apply(repo, seen, plan)


def test_several_push_while_a_gc_collects(tmp_path: Path) -> None:
    """Of any age: only leases and the look at the lock keep it from what has arrived and has no name yet."""
    target = Repository.init(LocalStore(tmp_path / "target", durable=False))
    done = threading.Event()

    def push_at_last(source: Repository, seen: Repository, branch: str) -> None:
        while True:
            try:
                plan = transfer.plan(source, seen, [branch], force=True)
                transfer.apply(source, seen, plan, batch_bytes=3 * HALF)
                return
            except (Conflict, NotFound, IntegrityError):  # a gc was first
                continue

    def push(who: int) -> dict[str, list[bytes]]:
        pushed = {}
        with Repository.init(MemoryStore()) as source, Repository.open(target.store) as seen:
            for i in range(6):
                data = halves(2, 0) + halves(2, 100 * who + i) + halves(1, i // 2)  # some of it common, some dropped
                snapshot(source, data, f"b{who}")
                push_at_last(source, seen, f"b{who}")
                if i % 3 == 2:
                    seen.delete_ref(RefKind.BRANCH, f"b{who}")
                    pushed.clear()
                pushed[source.resolve(f"b{who}")] = data
            push_at_last(source, seen, f"b{who}")
        return pushed

    def collect() -> None:
        with Repository.open(target.store) as collector:
            while not done.is_set():
                with contextlib.suppress(Conflict, IntegrityError):
                    gc.apply(collector, gc.plan(collector, min_age=0))

    with ThreadPoolExecutor(4) as pool:
        collector = pool.submit(collect)
        try:
            pushed = [future.result() for future in [pool.submit(push, who) for who in range(3)]]
        finally:
            done.set()
        collector.result()
    with Repository.open(target.store) as reopened:
        report = fsck.check(reopened)
        assert report.is_clean, report.findings
        for cid, data in [item for one in pushed for item in one.items()]:
            assert read_back(reopened, cid) == data
        assert not [*reopened.store.list(lease.PREFIX)]
    target.close()
