"""What people ask of a repository, each on the world of `worlds.fill`: for tests in which it goes wrong."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvist.errors import AlreadyExists, KvistError, NotFound, StoreError
from kvist.repo import RefKind, Repository, fsck, gc, lease, mending, prune, repair, stats, transfer
from kvist.repo.config import CONFIG
from kvist.repo.objects import MANIFESTS
from kvist.repo.segment import PREFIX as SEGMENTS
from kvist.store import LocalStore, MemoryStore, Store

from .making import halves, read_back, snapshot
from .worlds import RefName, copy, counted_out, fill

BRANCH, TAG = RefKind.BRANCH, RefKind.TAG
NEW = halves(2, 20) + halves(1, 21)
RULES = prune.Rules(branches=("long",), last=1)


WORLDS = "KVIST_TEST_WORLDS"
"""Where a process finds the world instead of making one."""


def save(store: MemoryStore, where: Path) -> None:
    LocalStore(where, durable=False).put_many([(info.key, store.get(info.key)) for info in store.list()], mode="create")


def load(where: Path) -> MemoryStore:
    store, saved = MemoryStore(), LocalStore(where)
    store.put_many([(info.key, saved.get(info.key)) for info in saved.list()], mode="create")
    return store


@functools.cache
def world() -> MemoryStore:
    """The same in every run; in a process that `kills.Killer` starts, that of its parent."""
    if WORLDS in os.environ:
        return load(Path(os.environ[WORLDS]) / "world")
    store = MemoryStore()
    with counted_out():
        fill(store)
    return store


@functools.cache
def ahead() -> MemoryStore:
    """A copy of the world that has gone on: what a push brings."""
    if WORLDS in os.environ:
        return load(Path(os.environ[WORLDS]) / "ahead")
    store = copy(world())
    with counted_out(seed=1), Repository.open(store) as repo:
        snapshot(repo, halves(3, 50))
        repo.fork("parts", 2, name="pushed")
        snapshot(repo, halves(2, 51), "pushed/1")
        repo.tag("pushed", "pushed/1")
    return store


@dataclass(frozen=True)
class Operation:
    """Something that people ask of a repository.

    Attributes:
        act: does it.
        is_done: whether it has been.
        moves: refs that it may change.
        again: what a second run may say where the first one's answer was lost.
        before: makes the world fit for it.
        is_read: whether it changes nothing.
        mends: whether it mends what ``before`` broke.
    """

    act: Callable[[Repository], object]
    is_done: Callable[[Repository], bool] = lambda repo: True
    moves: tuple[RefName, ...] = ()
    again: tuple[type[KvistError], ...] = ()
    before: Callable[[Store], object] = lambda store: None
    is_read: bool = False
    mends: bool = False


def holds(rev: str, data: list[bytes]) -> Callable[[Repository], bool]:
    return lambda repo: read_back(repo, rev) == data


def is_named(kind: RefKind, *names: str) -> Callable[[Repository], bool]:
    return lambda repo: all(repo.refs.read(kind, name) is not None for name in names)


def is_gone(kind: RefKind, name: str) -> Callable[[Repository], bool]:
    return lambda repo: repo.refs.read(kind, name) is None


def break_ref(store: Store) -> None:
    store.put("refs/branches/parts.ref", b"damaged")


def break_much(store: Store) -> None:
    """A manifest is gone, a page is flipped, another segment's footer is cut off."""
    with Repository.open(store) as repo:
        store.delete([MANIFESTS + repo.snapshot("parts").manifests[0].removeprefix("sha256:")])
        first, second = (repo.pages.homes(next(iter(repo.manifest(repo.snapshot(rev).manifests[0]).digests)))[0]
                         for rev in ("main", "f/0"))  # fmt: skip
    data = bytearray(store.get(first))
    data[3] ^= 8
    store.put(first, data)
    store.put(second, store.get(second)[:-9])
    assert first.startswith(SEGMENTS) and first != second


def collect(repo: Repository) -> None:
    gc.apply(repo, gc.plan(repo, min_age=0))


def renew(repo: Repository) -> None:
    """Hold one snapshot, then another; if the first try fails, the lease is none the worse for the second."""
    with lease.hold(repo, cids=[repo.resolve("main")]) as held:
        wanted = [repo.resolve("v1")]
        try:
            held.renew(wanted)
        except StoreError:
            held.renew(wanted)
            raise


def check(repo: Repository) -> None:
    assert fsck.check(repo).is_clean, "what could not be read this once is not damaged"


def push(repo: Repository) -> None:
    with Repository.open(ahead()) as source:
        transfer.apply(source, repo, transfer.plan(source, repo, everything=True))


def pushed(repo: Repository) -> bool:
    with Repository.open(ahead()) as source:
        return transfer.plan(source, repo, everything=True).is_empty


def pull_from(repo: Repository, target: Store) -> None:
    """The repository is what is read; whatever happens, its reader is none the worse."""
    with transfer.init_like(repo, target) if target.head(CONFIG) is None else Repository.open(target) as reader:
        try:
            transfer.apply(repo, reader, transfer.plan(repo, reader, everything=True, force=True))
        finally:
            with Repository.open(target) as again:
                check(again)
        assert transfer.plan(repo, reader, everything=True).is_empty


def clone(repo: Repository) -> None:
    pull_from(repo, MemoryStore())


def pull(repo: Repository) -> None:
    pull_from(repo, copy(behind()))


@functools.cache
def behind() -> MemoryStore:
    """A repository that has only some of the world."""
    store = MemoryStore()
    with Repository.open(world()) as source, transfer.init_like(source, store) as target:
        transfer.apply(source, target, transfer.plan(source, target, ["v1", "sparse"]))
        snapshot(target, halves(1, 55), "own")
    return store


def mend_all(repo: Repository) -> None:
    with Repository.open(world()) as source:
        mending.apply(repo, repair.plan(repo, source=source), source=source)


MAIN = ((BRANCH, "main"),)
PUSHED = (*MAIN, (BRANCH, "pushed/0"), (BRANCH, "pushed/1"), (TAG, "pushed"))
OPERATIONS = {
    "put pages": Operation(lambda repo: repo.put_pages(NEW)),
    "snapshot": Operation(lambda repo: snapshot(repo, NEW), holds("main", NEW), MAIN),
    "snapshot on a new branch": Operation(
        lambda repo: snapshot(repo, NEW, "new"), holds("new", NEW), ((BRANCH, "new"),)
    ),
    "snapshot on a deleted branch": Operation(
        lambda repo: snapshot(repo, NEW, "gone"), holds("gone", NEW), ((BRANCH, "gone"),)
    ),
    "snapshot without a branch": Operation(lambda repo: snapshot(repo, NEW, None)),
    "snapshot in place of a tip": Operation(
        lambda repo: snapshot(repo, NEW, replace=True), lambda repo: not repo.snapshot("main").parents, MAIN
    ),
    "fork": Operation(
        lambda repo: repo.fork("main", 3, name="k"),
        is_named(BRANCH, "k/0"),  # a crash may leave the first few, and their names are taken
        tuple((BRANCH, f"k/{i}") for i in range(3)),
        (AlreadyExists,),
    ),
    "branch": Operation(
        lambda repo: repo.branch("new", "v1"), is_named(BRANCH, "new"), ((BRANCH, "new"),), (AlreadyExists,)
    ),
    "branch --move": Operation(
        lambda repo: repo.branch("main", "v1", move=True),
        lambda repo: repo.resolve("main") == repo.resolve("v1"),
        MAIN,
    ),
    "tag": Operation(lambda repo: repo.tag("v2", "main"), is_named(TAG, "v2"), ((TAG, "v2"),), (AlreadyExists,)),
    "delete a branch": Operation(
        lambda repo: repo.delete_ref(BRANCH, "f/0"), is_gone(BRANCH, "f/0"), ((BRANCH, "f/0"),), (NotFound,)
    ),
    "delete a tag": Operation(lambda repo: repo.delete_ref(TAG, "v1"), is_gone(TAG, "v1"), ((TAG, "v1"),), (NotFound,)),
    "mend": Operation(
        lambda repo: repo.mend_ref(BRANCH, "parts", "v1"),
        is_named(BRANCH, "parts"),
        ((BRANCH, "parts"),),
        (AlreadyExists,),
        break_ref,
        mends=True,
    ),
    "push": Operation(push, pushed, PUSHED),
    "pull": Operation(pull),
    "clone": Operation(clone),
    "gc": Operation(collect, lambda repo: gc.plan(repo, min_age=0).is_empty),
    "hold a lease": Operation(
        lambda repo: lease.hold(repo, cids=[repo.resolve("main")]),
        lambda repo: repo.resolve("main") in lease.read(repo.store).cids,
    ),
    "renew a lease": Operation(renew),
    "prune": Operation(
        lambda repo: prune.apply(repo, prune.plan(repo, RULES)), lambda repo: prune.plan(repo, RULES).is_empty
    ),
    "repair": Operation(mend_all, lambda repo: fsck.check(repo).is_whole, before=break_much, mends=True),
    "checkout": Operation(lambda repo: [read_back(repo, rev) for rev in ("main", "parts", "f/0")], is_read=True),
    "log": Operation(lambda repo: repo.log(), is_read=True),
    "fsck": Operation(check, is_read=True),
    "stats": Operation(lambda repo: stats.count(repo), is_read=True),
}
