"""Transfer between two repositories: only what is missing moves, and all of it arrives."""

from __future__ import annotations

import collections
import json
import time
from dataclasses import replace

import pytest

from kvist.repo import RefKind, Repository, fsck, gc, marks, moving, signing, transfer
from kvist.repo.objects import manifest_key
from kvist.store import MemoryStore, MeteredStore, Store, Traffic, WrapperStore

from .making import LAYOUT, commit_parts, halves, manifest, read_back, snapshot
from .transferring import HALF, move, names, require_same


def test_an_empty_repository_gives_nothing(repo: Repository, target: Repository) -> None:
    plan = transfer.plan(repo, target, everything=True)
    assert plan.is_empty and plan.moves == ()
    assert transfer.apply(repo, target, plan) == transfer.Transferred(0, 0, ())
    assert [info.key for info in target.store.list()] == ["kvist.json"]


def test_everything_arrives(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(2))
    second = snapshot(repo, halves(2) + halves(1, 1))
    commit_parts(repo, "parts")
    repo.fork("main", 3, name="f")
    repo.tag("v1", second.cid)
    snapshot(repo, halves(1, 9), None)  # nothing names it: it stays
    plan = transfer.plan(repo, target, everything=True)
    assert names(target) == {}, "a plan changes nothing"
    seen: list[tuple[int, int]] = []
    done = transfer.apply(repo, target, plan, progress=lambda done, of: seen.append((done, of)))
    require_same(repo, target)
    assert done.pages == len(plan.lacking.pages) and done.page_bytes == plan.lacking.page_bytes
    assert seen[-1] == (plan.lacking.page_bytes, plan.lacking.page_bytes)
    assert len(done.refs) == 6
    assert transfer.plan(repo, target, everything=True).is_empty
    document = json.loads(json.dumps(plan.to_json()))
    assert document["pages"] == done.pages and {ref["act"] for ref in document["refs"]} == {"create"}


def test_only_what_is_asked_for_moves(repo: Repository, target: Repository) -> None:
    wanted, _ = snapshot(repo, halves(1, 0), "a"), snapshot(repo, halves(1, 1), "b")
    done = move(repo, target, "a")
    assert names(target) == {(RefKind.BRANCH, "a"): wanted.cid} and done.pages == 2
    assert [segment.data_bytes for segment in target.pages.segments()] == [2 * HALF]


def test_parents_come_before_children(repo: Repository, target: Repository) -> None:
    made = [snapshot(repo, halves(1, i)).cid for i in range(5)]
    assert transfer.plan(repo, target, ["main"]).lacking.snapshots == tuple(made)


def test_a_fork_of_what_was_pushed_moves_only_its_new_pages(repo: Repository, target: Repository) -> None:
    """By the bytes that go through the stores, not by our own count."""
    layout = replace(LAYOUT, head_dim=1024)
    data, new = halves(50, 0, layout), halves(3, 1, layout)
    snapshot(repo, [])
    repo.put_pages(data)
    repo.commit([manifest(data, layout)], branch="main")
    move(repo, target, "main")
    fork = repo.fork("main", 1, name="f")[0]
    repo.put_pages(new)
    repo.commit([manifest(data[:60] + new, layout)], branch="f/0")
    written, read = MeteredStore(target.store), MeteredStore(repo.store)
    with Repository.open(read) as source, Repository.open(written) as seen:
        written.reset()
        read.reset()
        plan = transfer.plan(source, seen, ["f/0"])
        assert fork.cid in plan.lacking.snapshots and len(plan.lacking.manifests) == 1
        done = transfer.apply(source, seen, plan)
    new_bytes = len(new) * layout.page_bytes
    assert plan.lacking.page_bytes == done.page_bytes == new_bytes
    pages_read = [read.traffic().get(kind, Traffic()).bytes for kind in ("get_ranges", "view")]
    assert sum(pages_read) == new_bytes
    objects = sum(len(repo.objects.encoded_manifest(cid)) for cid in plan.lacking.manifests)
    objects += sum(len(repo.snapshot(cid).encode()) for cid in plan.lacking.snapshots)
    overhead = written.bytes_written - new_bytes - objects
    assert 0 < overhead < 2048, "a segment's index, a ref, a lease"
    require_same(repo, target)


def test_what_the_target_has_under_another_name_is_not_sent(repo: Repository, target: Repository) -> None:
    snapshot(target, halves(4), "own")
    snapshot(repo, halves(4) + halves(1, 1))
    assert move(repo, target, "main").pages == 2
    assert read_back(target, "main") == read_back(repo, "main")


def test_history_that_the_target_reaches_is_not_read(repo: Repository, target: Repository) -> None:
    for i in range(20):
        snapshot(repo, halves(1, i))
    move(repo, target)
    snapshot(repo, halves(1, 99))
    for each in ("main", repo.log("main")[10].cid + ":old"):
        with Repository.open(metered := MeteredStore(repo.store)) as source:
            metered.reset()
            plan = transfer.plan(source, target, [each])
            assert metered.traffic().get("get", Traffic()).objects < 12
            transfer.apply(source, target, plan)
    assert fsck.check(target).is_clean


class FarStore(WrapperStore):
    """Takes its time, and knows how many reads of keys below each prefix it had to answer at once, at most."""

    parallel = 4  # type: ignore[assignment]

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.now: collections.Counter[str] = collections.Counter()
        self.most: collections.Counter[str] = collections.Counter()

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        prefix = key.partition("/")[0]
        self.now[prefix] += 1
        self.most[prefix] = max(self.most[prefix], self.now[prefix])
        time.sleep(0.05)
        self.now[prefix] -= 1
        return super().get(key, start=start, size=size)


def test_round_trips_overlap() -> None:
    """A push looks at many objects at the target at once; a pull into an empty place reads a history at once."""
    with Repository.init(MemoryStore()) as source, Repository.init(MemoryStore()) as target:
        for i in range(6):
            snapshot(source, halves(1, i))
        with Repository.open(there := FarStore(target.store)) as far:
            move(source, far, "main")
        assert min(there.most["snapshots"], there.most["manifests"]) >= 3
        with Repository.open(here := FarStore(source.store)) as far, Repository.init(MemoryStore()) as copy:
            move(far, copy, "main")
        assert min(here.most["snapshots"], here.most["manifests"]) >= 3


def test_many_tags_are_listed_once(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(1))
    listings = []
    for i in range(4):
        repo.tag(f"v{i}", "main")
        with Repository.open(metered := MeteredStore(target.store)) as seen:
            transfer.plan(repo, seen, everything=True)
            listings.append(metered.traffic()["list"].calls)
    assert len(set(listings)) == 1


def test_manifests_in_memory_are_bounded_by_their_bytes(
    repo: Repository, target: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(8):
        snapshot(repo, halves(1 + 8 * (i == 4), i))
    sizes = [len(repo.objects.encoded_manifest(cid)) for cid, _ in repo.objects.manifests()]
    most = 3 * min(sizes) + 9
    monkeypatch.setattr(moving, "_OBJECT_BYTES", most)
    put: list[list[int]] = []
    real = target.objects.put_encoded_manifests
    monkeypatch.setattr(
        target.objects, "put_encoded_manifests", lambda each: (put.append([*map(len, each)]), real(each))
    )
    move(repo, target)
    assert [max(sizes)] in put and all(sum(each) <= most for each in put if len(each) > 1)
    assert sorted(size for each in put for size in each) == sorted(sizes)
    require_same(repo, target)


def test_batches_are_durable_one_by_one(repo: Repository, target: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot(repo, halves(8))
    plan = transfer.plan(repo, target, ["main"])
    sizes: list[int] = []
    real = moving._read

    def read(source: Repository, batch: object, room: memoryview) -> list[memoryview]:
        sizes.append(len(room))
        return real(source, batch, room)  # type: ignore[arg-type]

    monkeypatch.setattr(moving, "_read", read)
    transfer.apply(repo, target, plan, batch_bytes=3 * HALF)
    assert sorted(segment.data_bytes for segment in target.pages.segments()) == [HALF] + [3 * HALF] * 5
    assert sizes == [3 * HALF] * 6, "two buffers, used again"
    require_same(repo, target)


def test_a_page_larger_than_a_batch_goes_alone(repo: Repository, target: Repository) -> None:
    snapshot(repo, halves(2))
    transfer.apply(repo, target, transfer.plan(repo, target, ["main"]), batch_bytes=1)
    assert [segment.data_bytes for segment in target.pages.segments()] == [HALF] * 4
    require_same(repo, target)


def test_a_manifest_of_a_foreign_encoding_travels_as_it_is(repo: Repository, target: Repository) -> None:
    data = halves(1)
    repo.put_pages(data)
    document = json.loads(manifest(data).encode())
    del document["kvist"], document["logical_seqs"]
    (encoded,) = [json.dumps(document | {"name": "theirs"}).encode()]
    repo.objects.put_encoded_manifests([encoded])
    (cid,) = [cid for cid, _ in repo.objects.manifests()]
    from kvist.repo import Snapshot

    made = Snapshot((cid,), created_ns=1)
    repo.objects.put_snapshots([made])
    repo.branch("main", made.cid)
    move(repo, target)
    assert target.objects.encoded_manifest(cid) == encoded
    require_same(repo, target)


# -- signatures, pruned snapshots ------------------------------------------------------------------------------------


def test_signatures_travel(repo: Repository, target: Repository) -> None:
    pytest.importorskip("cryptography")
    key = signing.PrivateKey.new()
    old, new = snapshot(repo, halves(1)), snapshot(repo, halves(1, 1))
    unnamed = snapshot(repo, halves(1, 2), None)
    for cid in (new.cid, unnamed.cid):
        signing.sign(repo.store, cid, key)
    move(repo, target)
    assert signing.signers(target.store, new.cid) == signing.signers(repo.store, new.cid) != []
    assert signing.signers(target.store, unnamed.cid) == []
    signing.sign(repo.store, old.cid, key)  # later than it was pushed
    plan = transfer.plan(repo, target, ["main"])
    assert len(plan.lacking.signatures) == 1 and not plan.is_empty and plan.summary().endswith(", 1 signatures")
    transfer.apply(repo, target, plan)
    assert signing.signers(target.store, old.cid) == signing.signers(repo.store, old.cid)
    assert transfer.plan(repo, target, ["main"]).is_empty


def test_what_is_no_signature_is_left(repo: Repository, target: Repository, caplog: pytest.LogCaptureFixture) -> None:
    made = snapshot(repo, halves(1))
    key = signing.signature_prefix(made.cid) + "0" * 64
    repo.store.put(key, bytes(5000))
    move(repo, target)
    assert target.store.head(key) is None and "is no signature" in caplog.text


def prune(repo: Repository, cid: str) -> None:
    marks.record_pruned(repo.store, [cid])
    gc.apply(repo, gc.plan(repo, min_age=0))


def test_what_the_source_has_pruned_goes_as_a_record(repo: Repository, target: Repository) -> None:
    old = snapshot(repo, halves(2))
    snapshot(repo, halves(1, 1))
    prune(repo, old.cid)
    assert not repo.objects.has(manifest_key(old.manifests[0]))
    plan = transfer.plan(repo, target, everything=True)
    assert plan.lacking.pruned == (old.cid,) and len(plan.lacking.pages) == 2
    transfer.apply(repo, target, plan)
    assert marks.pruned(target.store).keys() == {old.cid}
    assert [one.cid for one in target.log()] == [one.cid for one in repo.log()]
    assert read_back(target, "main") == read_back(repo, "main")
    assert fsck.check(target).is_clean
    assert transfer.plan(repo, target, everything=True).is_empty


def test_what_the_target_has_pruned_is_not_sent_again(repo: Repository, target: Repository) -> None:
    old = snapshot(repo, halves(2))
    snapshot(repo, halves(1, 1))
    move(repo, target)
    prune(target, old.cid)
    assert not target.objects.has(manifest_key(old.manifests[0]))
    for heal in (False, True):
        assert transfer.plan(repo, target, everything=True, heal=heal).is_empty
    snapshot(repo, halves(1, 2))
    assert len(transfer.plan(repo, target, everything=True).lacking.pages) == 2
    assert move(repo, target, f"{old.cid}:again").pages == 4, "asked for by name"
    assert read_back(target, "again") == halves(2)
    assert fsck.check(target).is_clean
