import gc as gc_of_python
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvist.errors import AlreadyExists, Conflict, InvalidInput, InvalidManifest, KvistError, Locked, StoreError
from kvist.repo import Repository, fsck, gc, lease, lock, record
from kvist.repo.keeper import Keeper
from kvist.repo.objects import manifest_key, snapshot_key
from kvist.store import ReadOnlyStore, Store
from kvist.testing.faults import Refuse
from kvist.testing.faulty import FaultyStore

from .making import halves, manifest, read_back, snapshot


def collect(repo: Repository) -> gc.GcPlan:
    return gc.apply(repo, gc.plan(repo, min_age=0))


def keys(store: Store) -> list[str]:
    return [info.key for info in store.list(lease.PREFIX)]


def age(store: Store, key: str, seconds: float) -> None:
    """Make a lease ``seconds`` older."""
    document = record.decode(key, store.get(key))
    store.put(key, record.encode(key, document | {"expires": document["expires"] - seconds}))


# -- what a lease holds --------------------------------------------------------------------------------------------


def test_a_lease_keeps_what_no_ref_reaches_with_its_ancestors(repo: Repository) -> None:
    old = snapshot(repo, halves(2), None)
    made = snapshot(repo, halves(1, 1), None, parents=[old.cid])
    other = snapshot(repo, halves(1, 2), None)
    with lease.hold(repo, cids=[made.cid], holder="a test") as held:
        assert held.cids == {made.cid}
        done = collect(repo)
        assert done.snapshots == (other.cid,) and done.leases == 1
        assert read_back(repo, made.cid) == halves(1, 1) and read_back(repo, old.cid) == halves(2)
    assert keys(repo.store) == []
    assert set(collect(repo).snapshots) == {made.cid, old.cid}


def test_what_is_written_since_stays(repo: Repository) -> None:
    with lease.hold(repo, since=True):
        data = halves(4)
        repo.put_pages(data)
        made = snapshot(repo, data[:2], None)
        assert collect(repo).is_empty
        assert read_back(repo, made.cid) == data[:2]
        assert repo.pages.put(data).new_pages == 0
    assert not collect(repo).is_empty


def test_a_young_manifest_protects_the_garbage_that_it_names(repo: Repository) -> None:
    """So a transfer need not send pages that lie there unnamed: it puts its manifests first."""
    data = halves(4)
    made = snapshot(repo, data, None)
    repo.store.delete([snapshot_key(made.cid), manifest_key(made.manifests[0])])
    with lease.hold(repo, since=True) as held:
        # the pages are older than the lease: say so
        found = record.decode(held.key, repo.store.get(held.key))
        assert found["since"] <= repo.pages.segments()[0].modified
        repo.objects.forget()
        repo.objects.put_manifests([manifest(data)])
        assert collect(repo).is_empty


def test_a_snapshot_that_is_gone_cannot_be_held(repo: Repository) -> None:
    made = snapshot(repo, halves(1), None)
    collect(repo)
    with pytest.raises(Conflict, match="is not held"):
        lease.hold(repo, cids=[made.cid])
    assert keys(repo.store) == []


def test_what_a_gc_has_announced_cannot_be_held(repo: Repository) -> None:
    made = snapshot(repo, halves(1), None)
    plan = gc.plan(repo, min_age=0)
    etag = lock.acquire(repo.store, gc._condemned(plan))
    with pytest.raises(Conflict):
        lease.hold(repo, cids=[made.cid])
    assert keys(repo.store) == []
    lock.release(repo.store, etag)
    with lease.hold(repo, cids=[made.cid]):
        assert gc.apply(repo, plan).is_empty
    assert read_back(repo, made.cid) == halves(1)


def test_a_lease_that_comes_after_the_plan_is_seen(repo: Repository) -> None:
    made = snapshot(repo, halves(1), None)
    plan = gc.plan(repo, min_age=0)
    with lease.hold(repo, cids=[made.cid]):
        assert gc.apply(repo, plan).is_empty


# -- time ----------------------------------------------------------------------------------------------------------


def test_a_lease_that_ran_out_holds_nothing_and_is_swept(repo: Repository) -> None:
    made = snapshot(repo, halves(1), None)
    held = lease.hold(repo, cids=[made.cid], ttl=10)
    age(repo.store, held.key, 10 + lease.CLOCK_SLACK / 2)
    assert lease.read(repo.store).cids == {made.cid}, "another machine's clock may be behind"
    assert collect(repo).is_empty
    age(repo.store, held.key, lease.CLOCK_SLACK)
    assert collect(repo).snapshots == (made.cid,)
    assert keys(repo.store) == []
    with pytest.raises(Conflict, match=f"{made.cid}: a gc took"):
        held.renew()
    assert held.cids == set()


def test_a_lease_that_ran_out_is_taken_anew(repo: Repository) -> None:
    """Under another key: a gc that saw the old one expired may be about to sweep it."""
    made = snapshot(repo, halves(1), None)
    with lease.hold(repo, cids=[made.cid], ttl=0.01) as held:
        old = held.key
        time.sleep(0.02)
        held.renew([made.cid])
        assert held.cids == {made.cid} and keys(repo.store) == [held.key] != [old]


@pytest.mark.parametrize("cids", [False, True])
def test_a_holder_that_slept_is_told_that_a_gc_is_taking_what_it_held(repo: Repository, cids: bool) -> None:
    """Renewed between the gc's survey and its sweep: the lease still lies there, and holds nothing."""
    made, young = snapshot(repo, halves(1), None), snapshot(repo, halves(1, 1), None)
    plan = gc.plan(repo, min_age=0)
    held = lease.hold(repo, cids=[made.cid, young.cid], ttl=0.01)
    time.sleep(0.02)
    doomed = lock.acquire(repo.store, replace(gc._condemned(plan), objects=frozenset([snapshot_key(made.cid)])))
    for _ in range(2):
        with pytest.raises(Conflict, match=made.cid):
            held.renew([made.cid, young.cid] if cids else [made.cid])
        assert held.cids == ({young.cid} if cids else set())
    lock.release(repo.store, doomed)
    held.renew([made.cid])
    assert held.cids == {made.cid}, "spared"
    held.release()


@pytest.mark.parametrize("gone", [False, True])
def test_what_was_written_under_a_lease_that_ran_out_may_be_gone(repo: Repository, gone: bool) -> None:
    with lease.hold(repo, since=True, ttl=lease.TTL if gone else 0.01) as held:
        if gone:
            repo.store.delete([held.key])
        time.sleep(0.02)
        with pytest.raises(Conflict, match="ran out or was deleted"):
            held.renew()


@pytest.mark.parametrize("error", [StoreError, AlreadyExists, Conflict])
def test_an_answer_that_was_lost_costs_nothing(repo: Repository, error: type[KvistError]) -> None:
    made = snapshot(repo, halves(1), None)
    store = FaultyStore(repo.store, Refuse(ops={"put"}, prefix=lease.PREFIX, after=True, at={2}, error=error))
    with Repository.open(store) as far, lease.hold(far, cids=[made.cid]) as held:
        with pytest.raises(error, match="as was wished"):
            held.renew()
        held.renew()
        assert held.cids == {made.cid} and keys(repo.store) == [held.key]


def test_renewing_moves_the_end_and_changes_what_is_held(repo: Repository) -> None:
    first, second = snapshot(repo, halves(1), None), snapshot(repo, halves(1, 1), None)
    with lease.hold(repo, cids=[first.cid], since=True, ttl=5) as held:
        (before,) = lease.read(repo.store).live
        held.renew()
        (after,) = lease.read(repo.store).live
        assert after.expires >= before.expires and (after.cids, after.since) == (before.cids, before.since)
        held.renew([second.cid])
        assert lease.read(repo.store).cids == {second.cid}
        gone = snapshot_key("sha256:" + "0" * 64)
        with pytest.raises(Conflict):
            held.renew([second.cid, "sha256:" + gone.removeprefix("snapshots/")])
        assert second.cid in lease.read(repo.store).cids, "the others are held on"


def test_a_lease_renewed_while_a_gc_sweeps_is_not_swept(repo: Repository) -> None:
    with lease.hold(repo, ttl=1) as held:
        age(repo.store, held.key, 2 + lease.CLOCK_SLACK)
        (expired,) = lease.read(repo.store).expired
        age(repo.store, held.key, -1000)
        lease.sweep(repo.store, [expired])
        assert keys(repo.store) == [held.key]


@pytest.mark.parametrize("ttl", [0, -1, lease.TTL_MAX + 1, math.nan])
def test_a_ttl_that_makes_no_sense(repo: Repository, ttl: float) -> None:
    with pytest.raises(InvalidInput):
        lease.hold(repo, ttl=ttl)


# -- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"cids": ["x"]}, {"expires": "soon"}, {"expires": 1}, {"since": True},
                                    {"kind": "x"}, {"version": 2}, {"more": 1}, {"holder": None}])  # fmt: skip
def test_a_record_that_is_none_is_refused(repo: Repository, change: dict[str, object]) -> None:
    with lease.hold(repo) as held:
        document = record.decode(held.key, repo.store.get(held.key))
        data = record.encode(held.key, document | change)
        with pytest.raises(InvalidManifest):
            lease.LeaseRecord.decode(held.key, "", data)


def test_an_unreadable_lease_stops_a_gc_until_no_lease_can_be_so_old(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(repo, halves(1), None)
    held = lease.hold(repo)
    data = bytearray(repo.store.get(held.key))
    data[5] ^= 1
    repo.store.put(held.key, data)
    with pytest.raises(Locked, match=held.key):
        gc.plan(repo, min_age=0)
    assert [finding.code for finding in fsck.check(repo).findings] == [fsck.Code.DAMAGED_LEASE]
    later = time.time() + lease.TTL_MAX + lease.CLOCK_SLACK + 1
    monkeypatch.setattr(lease.time, "time", lambda: later)
    assert not collect(repo).is_empty
    assert keys(repo.store) == []


def test_the_bytes_are_canonical(repo: Repository) -> None:
    with lease.hold(repo, holder="x" * 1000) as held:
        data = repo.store.get(held.key)
        assert json.loads(data)["holder"] == "x" * 200
        assert lease.LeaseRecord.decode(held.key, "", data).encode() == data


# -- a live engine -------------------------------------------------------------------------------------------------


class Engine:
    """What has heads."""

    def __init__(self, heads: Sequence[str] = ()) -> None:
        self.heads, self.asked = list(heads), 0

    def wanted(self) -> list[str]:
        self.asked += 1
        return self.heads


def wait_for(condition: object, keeper: Keeper) -> None:
    while not condition():  # type: ignore[operator]
        keeper.nudge()
        time.sleep(0.01)


def test_a_keeper_holds_what_is_wanted_until_it_is_closed(repo: Repository) -> None:
    first, second = snapshot(repo, halves(1), None), snapshot(repo, halves(1, 1), None)
    engine = Engine()
    wanted = engine.heads
    keeper = Keeper(repo, engine, Engine.wanted, holder="engine")
    keeper.nudge()
    assert keys(repo.store) == []
    wanted.append(first.cid)
    wait_for(lambda: lease.read(repo.store).cids == {first.cid}, keeper)
    wanted[:] = [second.cid, "sha256:" + "0" * 64]
    wait_for(lambda: lease.read(repo.store).cids == {second.cid}, keeper)
    wanted.clear()
    wait_for(lambda: keys(repo.store) == [], keeper)
    wanted.append(first.cid)
    wait_for(lambda: lease.read(repo.store).cids == {first.cid}, keeper)
    keeper.close()
    keeper.close()
    assert keys(repo.store) == [] and not [t for t in threading.enumerate() if t.name == "kvist-keeper"]
    keeper.nudge()
    assert not [t for t in threading.enumerate() if t.name == "kvist-keeper"]


def test_a_keeper_renews_and_takes_a_swept_lease_anew(repo: Repository) -> None:
    made = snapshot(repo, halves(1), None)
    engine = Engine([made.cid])
    keeper = Keeper(repo, engine, Engine.wanted, ttl=0.3)
    keeper.nudge()
    wait_for(lambda: keys(repo.store), keeper)
    (first,) = lease.read(repo.store).live
    while lease.read(repo.store).live[0].expires == first.expires:
        time.sleep(0.01)  # by itself
    repo.store.delete([first.key])
    wait_for(lambda: keys(repo.store) and keys(repo.store) != [first.key], keeper)
    keeper.close()
    assert keys(repo.store) == []


def test_a_keeper_holds_on_to_all_but_what_a_gc_is_taking(repo: Repository, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = snapshot(repo, halves(1), None), snapshot(repo, halves(1, 1), None)
    engine = Engine([good.cid])
    keeper = Keeper(repo, engine, Engine.wanted)
    wait_for(lambda: keys(repo.store), keeper)
    (key,) = keys(repo.store)
    doomed = lock.acquire(repo.store, lock.Condemned(objects=frozenset([snapshot_key(bad.cid)])))
    engine.heads.append(bad.cid)
    wait_for(lambda: caplog.messages, keeper)
    assert good.cid in lease.read(repo.store).cids and keys(repo.store) == [key]
    lock.release(repo.store, doomed)
    before = engine.asked
    wait_for(lambda: engine.asked > before + 1, keeper)
    repo.store.delete([snapshot_key(bad.cid)])
    wait_for(lambda: f"snapshot {bad.cid}, which the engine holds, is gone" in caplog.messages, keeper)
    assert lease.read(repo.store).cids == {good.cid} and keys(repo.store) == [key]
    keeper.close()


def test_a_keeper_ends_with_its_owner(repo: Repository) -> None:
    engine = Engine([snapshot(repo, halves(1), None).cid])
    keeper = Keeper(repo, engine, Engine.wanted)
    wait_for(lambda: keys(repo.store), keeper)
    del engine
    gc_of_python.collect()
    while keys(repo.store):
        time.sleep(0.01)
    keeper.close()


def test_a_keeper_outlives_a_store_that_takes_no_writes(repo: Repository, caplog: pytest.LogCaptureFixture) -> None:
    made = snapshot(repo, halves(1), None)
    with Repository.open(ReadOnlyStore(repo.store)) as readonly:
        engine = Engine([made.cid])
        keeper = Keeper(readonly, engine, Engine.wanted)
        wait_for(lambda: engine.asked > 3, keeper)
        keeper.close()
    assert sum("not protected from a gc" in line for line in caplog.messages) == 1
    with pytest.raises(StoreError):
        ReadOnlyStore(repo.store).delete([])
