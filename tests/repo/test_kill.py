"""What is acknowledged survives kill -9, at any moment, and what is not leaves no trace that hurts."""

import random
import time
from pathlib import Path

import pytest

from kvist.repo import Repository, fsck, gc
from kvist.store import LocalStore

from .making import halves, read_back, snapshot
from .processes import pages_of, start


def kill_and_check(root: Path, rounds: range) -> list[str]:
    """Kill a process that snapshots, once a round; returns all branches acknowledged."""
    acknowledged: dict[str, list[bytes]] = {}
    unnamed: set[str] = set()
    errors = []
    for seed in rounds:
        chance = random.Random(seed)
        at_write = 0 if seed % 2 else chance.randint(1, 60)
        child = start("snapshots", root, seed, at_write, chance.choice(["before", "after"]))
        assert child.stdout is not None
        if not at_write:
            lines = [child.stdout.readline() for _ in range(chance.randint(1, 8))]
            time.sleep(chance.random() * 0.05)
            child.kill()
        else:
            lines = []
        lines += child.stdout.readlines()
        child.wait()
        child.stdout.close()
        for line in lines:
            if not line.endswith("\n"):
                continue
            if line.startswith("error"):
                errors.append(line)
                continue
            cid, made, i, branch = line.split()
            acknowledged[cid] = pages_of(int(made), int(i))
            if branch == "None":
                unnamed.add(cid)
        with Repository.open(LocalStore(root)) as repo:
            report = fsck.check(repo)
            assert report.is_clean, report.findings
            stored = {cid for cid, _ in repo.objects.snapshots()}
            assert acknowledged.keys() - unnamed <= stored
            for cid in acknowledged.keys() & stored:
                assert read_back(repo, cid) == acknowledged[cid]
            if seed % 4 == 3:
                gc.apply(repo, gc.plan(repo, min_age=0))
                assert fsck.check(repo).is_clean
                assert gc.plan(repo, min_age=0).is_empty
                assert not [*(root / ".tmp").iterdir()]
                unnamed_gone = {cid for cid in unnamed if cid not in {c for c, _ in repo.objects.snapshots()}}
                for cid in unnamed_gone:
                    del acknowledged[cid]
                unnamed -= unnamed_gone
    return errors


def test_kill_9(tmp_path: Path) -> None:
    Repository.init(LocalStore(tmp_path)).close()
    assert kill_and_check(tmp_path, range(10)) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_9_a_hundred_times(tmp_path: Path) -> None:
    for group in range(10):
        root = tmp_path / str(group)
        Repository.init(LocalStore(root)).close()
        assert kill_and_check(root, range(100 + 10 * group, 110 + 10 * group)) == []


def test_a_killed_gc_blocks_nobody(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    with Repository.init(store) as repo:
        data = halves(2)
        snapshot(repo, data, branch=None)
        child = start("hold_gc", tmp_path)
        assert child.communicate()[0] == "announced\n" and child.returncode == -9
        made = snapshot(repo, data)  # exactly what that gc had condemned
        assert repo.pages.put(data).new_pages == 0
        gc.apply(repo, gc.plan(repo, min_age=0))
        assert read_back(repo, made.cid) == data
