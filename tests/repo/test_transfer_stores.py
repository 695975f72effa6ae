"""Transfers between repositories on every kind of store: S3, an OCI image layout, a directory, memory."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvist.errors import AlreadyExists, Conflict, RepositoryNotFound
from kvist.repo import RefKind, Repository, fsck, gc, lease, transfer
from kvist.store import MemoryStore, ReadOnlyStore, Store, open_store
from kvist.testing.faults import CrashingStore, SimulatedCrash

from .making import halves, snapshot
from .transferring import HALF, fill, move, names, require_same

KINDS = ("memory", "local", "oci", "moto", "seaweed")

Make = Callable[[str], Store]


@pytest.mark.parametrize(("one", "other"), [*itertools.pairwise([*KINDS, KINDS[0]])])
def test_there_and_back(new_store: Make, one: str, other: str) -> None:
    """Each kind is a source and a target, and both are told of changes on the other side."""
    with Repository.init(new_store(one)) as source, Repository.init(new_store(other)) as target:
        fill(source)
        move(source, target)
        require_same(source, target)
        snapshot(target, halves(2, 7))
        target.delete_ref(RefKind.BRANCH, "f/0")
        assert move(target, source, "main").pages == 4
        source.delete_ref(RefKind.BRANCH, "f/0")
        gc.apply(source, gc.plan(source, min_age=0))
        require_same(target, source)
        assert transfer.plan(source, target, everything=True, heal=True).is_empty


@pytest.mark.parametrize("kind", ["oci", "moto"])
def test_a_crash_is_gone_on_from(new_store: Make, kind: str, tmp_path: Path) -> None:
    with Repository.init(MemoryStore()) as source:
        snapshot(source, halves(4))
        total = 8 * HALF
        store = new_store(kind)
        Repository.init(store).close()
        for at in (4, 3):  # right after its first batch, twice
            with Repository.open(CrashingStore(store, at, after=True)) as seen, pytest.raises(SimulatedCrash):
                plan = transfer.plan(source, seen, everything=True)
                transfer.apply(source, seen, plan, batch_bytes=2 * HALF)
        with Repository.open(store) as target:
            assert fsck.check(target).is_clean
            arrived = sum(segment.data_bytes for segment in target.pages.segments())
            assert 0 < arrived < total
            assert move(source, target).page_bytes == total - arrived
            target.store.delete([info.key for info in target.store.list(lease.PREFIX)])
            require_same(source, target)


def test_a_read_only_source(new_store: Make) -> None:
    with Repository.init(new_store("moto")) as source, Repository.init(MemoryStore()) as target:
        fill(source)
        with Repository.open(ReadOnlyStore(source.store)) as seen:
            move(seen, target)
        require_same(source, target)


# -- an OCI image layout -----------------------------------------------------------------------------------------


def test_an_artifact_is_a_repository(new_store: Make, tmp_path: Path) -> None:
    """All that works on a repository works on it: forks, tags, gc, another tag of the same layout."""
    with Repository.init(MemoryStore()) as source, Repository.init(new_store("oci")) as target:
        fill(source)
        move(source, target)
        target.fork("main", 2, name="g")
        snapshot(target, halves(1, 8), "main", parents=[], replace=True)
        for name in ("g/0", "g/1", "main"):
            target.delete_ref(RefKind.BRANCH, name)
        gc.apply(target, gc.plan(target, min_age=0))
        move(source, target, "main", force=True)
        require_same(source, target)
        with transfer.init_like(source, open_store(f"oci:{tmp_path}/layout:v2")) as second:
            move(source, second, "parts")
            assert names(second) == {(RefKind.BRANCH, "parts"): source.resolve("parts")}
        require_same(source, target)
    blobs = {path.name for path in (tmp_path / "layout" / "blobs" / "sha256").iterdir()}
    assert source.resolve("main").removeprefix("sha256:") in blobs, "a snapshot's blob has the cid for its name"
    with pytest.raises(RepositoryNotFound):
        Repository.open(f"oci:{tmp_path}/layout:v3")
    with pytest.raises(AlreadyExists):
        transfer.init_like(source, open_store(f"oci:{tmp_path}/layout:v2"))


def test_two_pushes_to_one_artifact(new_store: Make) -> None:
    with (
        Repository.init(MemoryStore()) as one,
        Repository.init(MemoryStore()) as two,
        Repository.init(new_store("oci")) as to,
    ):
        snapshot(one, halves(2), "a")
        theirs = snapshot(two, halves(2) + halves(1, 1), "a")
        plan = transfer.plan(one, to, ["a"])
        move(two, to, "a")
        with pytest.raises(Conflict):
            transfer.apply(one, to, plan)
        assert to.resolve("a") == theirs.cid and fsck.check(to).is_clean


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_what_skopeo_copied_is_pulled(new_store: Make, tmp_path: Path) -> None:
    with Repository.init(MemoryStore()) as source, Repository.init(new_store("oci")) as pushed:
        fill(source)
        move(source, pushed)
        words = ["skopeo", "--insecure-policy", "copy", "--preserve-digests"]
        words += [f"oci:{tmp_path}/layout:v1", f"oci:{tmp_path}/copy:v5"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with Repository.open(f"oci:{tmp_path}/copy:v5") as copy, Repository.init(MemoryStore()) as target:
            assert copy.id == pushed.id
            move(copy, target)
            require_same(source, target)
