"""A push killed with -9 at any write: what was there is whole, no ref points at nothing, and the next push goes on."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from kvist.repo import Repository, fsck, lease, transfer
from kvist.store import LocalStore

from .making import LAYOUT, halves, read_back, snapshot
from .processes import start

HALF = LAYOUT.page_bytes


def fill(root: Path) -> None:
    """Two branches with history, a fork and a tag; 24 page halves."""
    with Repository.init(LocalStore(root, durable=False)) as repo:
        for i in range(3):
            snapshot(repo, halves(2, 0) + halves(2, i + 1))
        snapshot(repo, halves(4, 9), "side")
        repo.fork("main", 2, name="f")
        repo.tag("v1", "side")


def kill_and_check(source: Path, target: Path, kills: int, first_seed: int = 0) -> set[int]:
    """Kill so many pushes; returns how many bytes each push that got through had to move."""
    left, killed = set(), 0
    with Repository.open(LocalStore(source)) as repo:
        wanted = {(ref.kind, ref.name): ref.cid for ref in repo.refs.all()}
        for seed in itertools.count(first_seed):
            if killed >= kills:
                return left
            root, chance = target / str(seed), random.Random(seed)
            Repository.init(LocalStore(root, durable=False)).close()
            while True:  # killed again and again, until one gets through
                before = {}
                with Repository.open(LocalStore(root)) as there:
                    before = {(ref.kind, ref.name): ref.cid for ref in there.refs.all()}
                at, when = chance.randint(1, 30), chance.choice(["before", "after"])
                child = start("push", source, root, at, when)
                assert child.stdout is not None
                out = child.stdout.read()
                child.wait()
                child.stdout.close()
                with Repository.open(LocalStore(root)) as there:
                    report = fsck.check(there)
                    assert report.is_clean, report.findings
                    refs = {(ref.kind, ref.name): ref.cid for ref in there.refs.all()}
                    assert before.items() <= refs.items() <= wanted.items()
                    for name in {cid for cid in refs.values() if cid is not None}:
                        assert read_back(there, name) == read_back(repo, name)
                if child.returncode == 0:
                    left.add(int(out))
                    break
                assert child.returncode == -9
                killed += 1
            with Repository.open(LocalStore(root)) as there:
                assert {(ref.kind, ref.name): ref.cid for ref in there.refs.all()} == wanted
                assert {cid for cid, _ in there.objects.snapshots()} == repo.reachable().keys()
                there.store.delete([info.key for info in there.store.list(lease.PREFIX)])  # those of the dead run out
                assert transfer.plan(repo, there, everything=True, heal=True).is_empty
                assert sum(segment.data_bytes for segment in there.pages.segments()) == 24 * HALF
    raise AssertionError


def test_kill_9(tmp_path: Path) -> None:
    fill(tmp_path / "source")
    left = kill_and_check(tmp_path / "source", tmp_path, 20)
    assert len(left) > 1 and min(left) < 24 * HALF, "an interrupted push goes on where it was"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kill_9_two_hundred_times(tmp_path: Path) -> None:
    fill(tmp_path / "source")
    kill_and_check(tmp_path / "source", tmp_path, 200, 1000)
