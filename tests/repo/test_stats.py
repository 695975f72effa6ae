import dataclasses
import json

from kvist.repo import RefKind, Repository, gc, lease, marks
from kvist.repo.objects import manifest_key
from kvist.repo.stats import count

from .making import LAYOUT, commit_parts, halves, manifest, snapshot

HALF = LAYOUT.page_bytes


def test_the_whole(repo: Repository) -> None:
    empty = count(repo)
    assert (empty.dedup, empty.by_branch, empty.by_layout, empty.garbage_bytes) == (1.0, (), (), 0)
    snapshot(repo, halves(2))
    snapshot(repo, halves(3))
    repo.tag("v1", "main")
    snapshot(repo, halves(1, 9), None)
    found = count(repo)
    assert (found.branches, found.tags, found.snapshots, found.unreachable_snapshots) == (1, 1, 3, 1)
    assert (found.manifests, found.segments, found.damaged_pages, found.leases) == (3, 3, 0, 0)
    assert (found.logical_bytes, found.page_bytes, found.tokens) == (10 * HALF, 6 * HALF, 20)
    assert found.dedup == 10 / 6
    assert found.stored_bytes == sum(info.size for info in repo.store.list())
    assert json.loads(json.dumps(found.to_json()))["dedup"] == 10 / 6


def test_what_a_gc_would_free(repo: Repository) -> None:
    snapshot(repo, halves(1))
    lost = snapshot(repo, halves(2, 1), None)
    assert count(repo).garbage_bytes == 0, "young"
    assert count(repo, min_age=0).garbage_bytes == gc.plan(repo, min_age=0).delete_bytes
    with lease.hold(repo, cids=[lost.cid]):
        found = count(repo, min_age=0)
        assert (found.garbage_bytes, found.leases) == (0, 1)
    repo.store.delete([manifest_key(repo.snapshot("main").manifests[0])])
    assert count(repo, min_age=0).garbage_bytes is None, "a gc refuses"


def test_what_a_branch_has_for_itself(repo: Repository) -> None:
    shared = halves(2)
    snapshot(repo, shared, "a")
    snapshot(repo, shared + halves(1, 1), "a")
    snapshot(repo, shared + halves(3, 2), "b")
    repo.fork("a", 2, name="f")
    found = {branch.name: branch for branch in count(repo).by_branch}
    assert sorted(found) == ["a", "b", "f/0", "f/1"]
    assert (found["a"].snapshots, found["f/0"].snapshots, found["b"].snapshots) == (2, 3, 1)
    assert (found["a"].page_bytes, found["a"].own_bytes) == (6 * HALF, 0), "its forks hold it too"
    assert found["a"].logical_bytes == 10 * HALF and found["f/1"].logical_bytes == 16 * HALF
    assert (found["b"].page_bytes, found["b"].own_bytes, found["b"].shared_bytes) == (10 * HALF, 6 * HALF, 4 * HALF)
    for name in ("f/0", "f/1"):
        repo.delete_ref(RefKind.BRANCH, name)
    (a, _) = count(repo).by_branch
    assert a.own_bytes == 2 * HALF
    assert json.loads(json.dumps(a.to_json()))["shared_bytes"] == 4 * HALF
    repo.tag("v1", "a")
    assert count(repo).by_branch[0].own_bytes == 0, "a tag holds it too"


def test_what_is_own_is_what_deleting_frees(repo: Repository) -> None:
    for branch, seed in (("a", 1), ("b", 2), ("a", 3), ("c", 1)):
        snapshot(repo, halves(2, seed) + halves(1, seed + 1), branch)
    for branch in count(repo).by_branch:
        before = count(repo).page_bytes
        ref = repo.delete_ref(RefKind.BRANCH, branch.name)
        assert before - count(repo).page_bytes == branch.own_bytes
        repo.branch(branch.name, ref.cid or "")


def test_layouts(repo: Repository) -> None:
    snapshot(repo, halves(2), "a")
    other = dataclasses.replace(LAYOUT, page_size_tokens=8, model="org/other")
    data = halves(3, 1, other)
    repo.put_pages(data)
    repo.commit([manifest(data, other)], branch="b")
    big, small = count(repo).by_layout
    assert (big.model, big.fingerprint, big.snapshots) == ("org/other", other.fingerprint, 1)
    assert big.page_bytes == 6 * other.page_bytes and small.page_bytes == 4 * HALF
    commit_parts(repo, "parts")
    assert len(count(repo).by_layout) == 6


def test_what_was_pruned_counts_as_a_record(repo: Repository) -> None:
    first = snapshot(repo, halves(1))
    snapshot(repo, halves(1, 1))
    marks.record_pruned(repo.store, [first.cid])
    found = count(repo, min_age=0)
    assert (found.snapshots, found.pruned_snapshots, found.page_bytes) == (2, 1, 2 * HALF)
    (branch,) = found.by_branch
    assert (branch.snapshots, branch.pruned, branch.page_bytes) == (2, 1, 2 * HALF)
    assert found.garbage_bytes and found.garbage_bytes > 2 * HALF
