"""What the tests run in other processes: ``python -m repo.processes NAME ARGUMENTS``, in ``tests/``."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from kvist.errors import Conflict, IntegrityError, KvistError, Locked, NotFound
from kvist.repo import RefKind, Repository, gc, transfer
from kvist.store import LocalStore
from kvist.testing.faults import CrashingStore

from .making import LAYOUT, digest, halves, manifest, read_back, snapshot

TESTS = Path(__file__).parent.parent


def start(name: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "repo.processes", name, *map(str, arguments)]
    return subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True)


def pages_of(seed: int, i: int) -> list[bytes]:
    """Those of snapshot i: three shared with its neighbours, two of its own."""
    return halves(3, seed * 1000 + i // 4) + halves(2, seed * 1000 + 500 + i)


def snapshots(root: str, seed: str, write: str, after: str) -> None:
    """Snapshot without end, and say so; at store write number ``write`` (0: never) kill yourself."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    local = LocalStore(Path(root), durable=int(seed) % 2 == 0)
    store = CrashingStore(local, int(write) or None, after=after == "after", crash=die)
    repo = Repository.open(store)
    for i in range(1_000_000):
        branch = ["main", None, "side"][i % 3]
        made = snapshot(repo, pages_of(int(seed), i), branch)
        print(made.cid, seed, i, branch, flush=True)
        if i % 5 == 4:
            fork = repo.fork(made.cid, 2, name=f"fork/{seed}/{i}")[1]
            print(fork.cid, seed, i, f"fork/{seed}/{i}/1", flush=True)
        if i % 7 == 6:
            repo.branch("moving", made.cid, move=True)
        if i % 11 == 10:
            try:
                gc.apply(repo, gc.plan(repo, min_age=0 if branch is not None else 60))
            except KvistError as error:
                print("error", error, flush=True)


def hold_gc(root: str) -> None:
    """Announce a gc, say so, and be killed in the middle of it."""

    def die() -> None:
        print("announced", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    repo = Repository.open(CrashingStore(LocalStore(Path(root)), 2, crash=die))
    gc.apply(repo, gc.plan(repo, min_age=0))


def commit_many(root: str, seed: str, rounds: str) -> None:
    """Commit on an own branch and on the shared one, trying again when a gc or another writer was first."""
    repo = Repository.open(LocalStore(Path(root), durable=False))
    for i in range(int(rounds)):
        # half of the pages were used, and dropped, a round ago: a gc may be taking them this very moment
        data = pages_of(0, i // 2) if i % 2 else pages_of(int(seed), i)
        for branch in (f"own/{seed}", "shared", f"brief/{seed}"):
            tries = 0
            while True:
                tries += 1
                assert tries < 500, "starved"
                try:
                    made = snapshot(repo, data, branch)
                    break
                except (Conflict, NotFound, IntegrityError):
                    continue
            if branch.startswith("brief"):
                repo.delete_ref(RefKind.BRANCH, branch)
            else:
                print(made.cid, 0 if i % 2 else seed, i // 2 if i % 2 else i, branch, tries, flush=True)
        assert read_back(repo, f"own/{seed}") == data
    assert digest(data[0]) in manifest(data).digests


def push(source: str, target: str, write: str, after: str) -> None:
    """Push everything, in batches of three page halves, and say how many bytes went; be killed at that store write."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    store = CrashingStore(LocalStore(Path(target), durable=False), int(write), after=after == "after", crash=die)
    with Repository.open(LocalStore(Path(source))) as here, Repository.open(store) as there:
        plan = transfer.plan(here, there, everything=True)
        print(transfer.apply(here, there, plan, batch_bytes=3 * LAYOUT.page_bytes).page_bytes, flush=True)


class Uncleaned(LocalStore):
    """Leaves temporaries: cleaned at age 0, one that is made this instant, and not yet locked, would go too."""

    def clean(self, older_than: float) -> int:
        return 0


def collect(root: str, rounds: str) -> None:
    """Collect garbage of any age, again and again."""
    repo = Repository.open(Uncleaned(Path(root), durable=False))
    for _ in range(int(rounds)):
        try:
            done = gc.apply(repo, gc.plan(repo, min_age=0))
            print("collected", len(done.snapshots), len(done.segments), len(done.repack), flush=True)
        except Locked as error:
            print("locked", error, flush=True)
        except IntegrityError as error:
            print("refused", error, flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
