"""Sixteen writers and a gc on one repository, in processes of their own: nothing is lost, and nobody waits for ever."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvist.errors import Conflict, IntegrityError, NotFound
from kvist.repo import RefKind, Repository, fsck, gc
from kvist.store import Store, open_store

from .making import read_back, snapshot
from .processes import TESTS, Uncleaned, pages_of


def _open(url: str) -> Store:
    return Uncleaned(Path(url), durable=False) if url.startswith("/") else open_store(url)


def say(*words: object) -> None:
    """A line in one piece: the others write into the same pipe."""
    os.write(sys.stdout.fileno(), " ".join([*map(str, words)]).encode() + b"\n")


def write(url: str, number: str, seconds: str) -> None:
    """Snapshot on an own branch, on the one of all, and on one that is deleted at once; fork, and read back.

    Half of the pages were used, and dropped, by somebody a moment ago: a gc may be taking them this very moment.
    """
    repo, seed, chance = Repository.open(_open(url)), int(number), random.Random(number)
    end = time.monotonic() + float(seconds)
    i = 0
    while time.monotonic() < end:
        of, at = (0, chance.randrange(8)) if chance.random() < 0.5 else (seed, i)
        for branch in (f"own/{seed}", "shared", f"brief/{seed}"):
            made, tries = None, 0
            while made is None:
                tries += 1
                try:
                    made = snapshot(repo, pages_of(of, at), branch)
                except (Conflict, NotFound, IntegrityError):  # a gc or another writer was first
                    time.sleep(chance.random() * min(0.01 * tries, 0.2))
            say("snapshot", made.cid, of, at, branch, tries)
            if branch.startswith("brief"):
                repo.delete_ref(RefKind.BRANCH, branch)
        assert read_back(repo, f"own/{seed}") == pages_of(of, at)
        if i % 5 == 4:
            try:
                for fork in repo.fork(f"own/{seed}", 2):
                    say("snapshot", fork.cid, of, at, fork.name, 1)
            except (Conflict, NotFound, IntegrityError):
                pass
        i += 1


def collect(url: str, seconds: str) -> None:
    """For so long, and until something was there to take."""
    repo = Repository.open(_open(url))
    end, freed = time.monotonic() + float(seconds), 0
    while time.monotonic() < end or not freed:
        try:
            done = gc.apply(repo, gc.plan(repo, min_age=0))
            freed += len(done.snapshots)
            say("collected", len(done.snapshots), len(done.segments), len(done.repack))
        except IntegrityError as error:
            say("refused", error)


def work(url: str, seconds: str, writers: str) -> None:
    """Fork all, at once and before anything is open; end well if each of them does."""
    jobs = [(write, (url, str(number), seconds)) for number in range(1, int(writers) + 1)]
    pids = []
    for act, arguments in (*jobs, (collect, (url, seconds))):
        pids.append(os.fork())
        if not pids[-1]:
            act(*arguments)
            os._exit(0)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    sys.exit(any(statuses))


def run(url: str, seconds: float, writers: int = 16) -> str:
    Repository.init(_open(url)).close()
    command = [sys.executable, "-m", "repo.test_busy", url, str(seconds), str(writers)]
    done = subprocess.run(command, cwd=TESTS, stdout=subprocess.PIPE, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0
    made = [line for line in lines if line[0] == "snapshot"]
    kept = [line for line in made if not line[4].startswith("brief")]
    collected = [line for line in lines if line[0] == "collected"]
    with Repository.open(_open(url)) as repo:
        report = fsck.check(repo)
        assert report.is_clean, report.findings
        reachable = repo.reachable()
        for _, cid, seed, i, branch, _ in kept:
            assert cid in reachable, f"lost on {branch}"
            assert read_back(repo, cid) == pages_of(int(seed), int(i))
        for branch in {line[4] for line in kept if not line[4].startswith("fork")}:
            assert len(repo.log(branch)) == sum(line[4] == branch for line in kept)
        gc.apply(repo, gc.plan(repo, min_age=0))
        assert fsck.check(repo).is_clean
        assert {cid for cid, _ in repo.objects.snapshots()} == reachable.keys()
    tries = sum(int(line[5]) - 1 for line in made)
    freed = sum(int(line[1]) for line in collected)
    refused = [" ".join(line[1:]) for line in lines if line[0] == "refused"]
    assert freed > 0 and len(collected) >= seconds / 30
    assert len(refused) <= 1 + len(collected) / 4, refused  # by a ref of this moment, which its writer is taking back
    return f"{len(made)} snapshots, {tries} tries again, {len(collected)} collections of {freed} snapshots, {refused=}"


def test_sixteen_writers_and_a_gc(tmp_path: Path) -> None:
    print(run(str(tmp_path), 4))


@pytest.mark.slow
def test_sixteen_writers_and_a_gc_for_a_minute(tmp_path: Path) -> None:
    print(run(str(tmp_path), 60))


@pytest.fixture(params=["moto", "seaweed"])
def bucket(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param).new_url()


def test_four_writers_and_a_gc_on_s3(bucket: str) -> None:
    print(run(bucket, 3, 4))


@pytest.mark.slow
def test_sixteen_writers_and_a_gc_on_s3_for_a_minute(bucket: str) -> None:
    print(run(bucket, 60))


if __name__ == "__main__":
    work(*sys.argv[1:])
