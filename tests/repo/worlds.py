"""A small repository that has some of everything, and what must stay true of it whatever happens."""

import contextlib
import itertools
import random
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import patch

from kvist.errors import IntegrityError, InvalidManifest, NotFound
from kvist.repo import RefKind, Repository, Snapshot, fsck
from kvist.store import MemoryStore, Store

from .making import commit_parts, halves, manifest, read_back, snapshot

RefName = tuple[RefKind, str]


@dataclass(frozen=True)
class Truth:
    """What a repository held once.

    Attributes:
        refs: cid by ref.
        snapshots: all that refs reached, by cid.
        pages: the bytes of each snapshot's page halves, in order.
    """

    refs: Mapping[RefName, str]
    snapshots: Mapping[str, Snapshot]
    pages: Mapping[str, list[bytes]]


@contextlib.contextmanager
def counted_out(seed: int = 0) -> Iterator[None]:
    """Times and random names are counted out instead: what is made within is the same in every run and process."""
    chance, times = random.Random(seed), itertools.count(1 + seed * 1_000_000)
    secrets = SimpleNamespace(token_hex=lambda n: chance.randbytes(n).hex())
    with (
        patch("uuid.uuid4", lambda: uuid.UUID(int=chance.getrandbits(128))),
        patch("kvist.repo.repository.time", SimpleNamespace(time_ns=lambda: next(times))),
        patch("kvist.repo.naming.time", SimpleNamespace(time_ns=lambda: next(times))),
        patch("kvist.repo.naming.secrets", secrets),
        patch("kvist.repo.refs.secrets", secrets),
    ):
        yield


def fill(store: Store) -> Store:
    """Branches with a history of two layouts, forks, tags, deleted names; segments that a gc deletes and rewrites."""
    with Repository.init(store) as repo:
        first = snapshot(repo, halves(2))
        repo.tag("v1", first.cid)
        commit_parts(repo, "parts", pages=2, seed=3)
        snapshot(repo, halves(2)[:2] + halves(2, 5))
        repo.fork("main", 2, name="f")
        snapshot(repo, halves(1, 6), "f/0")
        repo.put_pages(halves(4, 7))  # of this segment only a quarter will live
        repo.commit([manifest(halves(4, 7)[:2])], branch="sparse")
        for seed in range(40, 44):
            snapshot(repo, halves(1, seed), "long")
        snapshot(repo, halves(2, 8), None)
        repo.tag("gone", snapshot(repo, halves(1, 9), "gone").cid)
        repo.delete_ref(RefKind.BRANCH, "gone")
        repo.delete_ref(RefKind.TAG, "gone")
    return store


def copy(store: MemoryStore) -> MemoryStore:
    made = MemoryStore()
    made._objects = dict(store._objects)
    return made


def learn(store: Store) -> Truth:
    with Repository.open(store) as repo:
        return _learn(repo)


def _learn(repo: Repository) -> Truth:
    refs = {(ref.kind, ref.name): ref.cid for ref in repo.refs.all()}
    snapshots = repo.reachable()
    return Truth(refs, snapshots, {cid: read_back(repo, cid) for cid in snapshots})


def assert_nothing_lost(store: Store, truth: Truth, moved: Iterable[RefName] = ()) -> Truth:
    """Whatever a ref reached before, a ref reaches and reads; nothing is wrong; only ``moved`` refs changed.

    Returns:
        What it holds now.
    """
    with Repository.open(store) as repo:
        report = fsck.check(repo)
        assert report.is_clean, report.findings
        now = _learn(repo)
    changed = {name for name in now.refs.keys() | truth.refs.keys() if now.refs.get(name) != truth.refs.get(name)}
    assert changed <= set(moved), changed
    for cid in now.snapshots.keys() & truth.snapshots.keys():
        assert now.pages[cid] == truth.pages[cid]
        assert now.snapshots[cid] == truth.snapshots[cid]
    return now


def readable(store: Store, truth: Truth) -> set[str]:
    """Of the snapshots that refs reached once, those that can still be read; each gives what it gave."""
    found = set()
    with Repository.open(store) as repo:
        for cid, data in truth.pages.items():
            with contextlib.suppress(IntegrityError, InvalidManifest, NotFound):
                assert read_back(repo, cid) == data
                found.add(cid)
    return found
