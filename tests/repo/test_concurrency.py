"""Writers and a gc at once, in processes of their own."""

from pathlib import Path

import pytest

from kvist.repo import Repository, fsck, gc
from kvist.store import LocalStore

from .making import read_back
from .processes import pages_of, start


def run(root: Path, rounds: int, collections: int) -> tuple[int, list[str]]:
    Repository.init(LocalStore(root, durable=False)).close()
    writers = [start("commit_many", root, seed, rounds) for seed in range(1, 5)]
    collector = start("collect", root, collections)
    lines = [line for writer in writers for line in writer.communicate()[0].splitlines()]
    collected = collector.communicate()[0].splitlines()
    assert [process.returncode for process in (*writers, collector)] == [0] * 5
    with Repository.open(LocalStore(root)) as repo:
        report = fsck.check(repo)
        assert report.is_clean, report.findings
        reachable = repo.reachable()
        for line in lines:
            cid, seed, i, _, _ = line.split()
            assert cid in reachable
            assert read_back(repo, cid) == pages_of(int(seed), int(i))
        assert len(lines) == 2 * 4 * rounds
        assert len(repo.log("shared")) == 4 * rounds
        assert all(len(repo.log(f"own/{seed}")) == rounds for seed in range(1, 5))
        gc.apply(repo, gc.plan(repo, min_age=0))
        assert fsck.check(repo).is_clean
        assert {cid for cid, _ in repo.objects.snapshots()} == reachable.keys()
    return sum(int(line.split()[4]) - 1 for line in lines), collected


def test_four_writers_and_a_gc(tmp_path: Path) -> None:
    _, collected = run(tmp_path, 6, 25)
    assert [line for line in collected if line.startswith("collected")]


@pytest.mark.slow
def test_four_writers_and_a_gc_for_long(tmp_path: Path) -> None:
    retries, collected = run(tmp_path, 40, 200)
    print(retries, "retries;", *collected, sep="\n")
    assert retries
