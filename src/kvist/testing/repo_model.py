"""What `RepositoryMachine` compares a repository with: a plain model of it, and two processes that use it."""

from __future__ import annotations

import contextlib
import itertools
import random
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

from hypothesis.stateful import RuleBasedStateMachine

from kvist.errors import DamagedPage, IntegrityError, KvistError
from kvist.hashing import DIGESTS
from kvist.ids import format_digest
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, RefKind, Repository, Snapshot, gc, marks, segment
from kvist.repo.lineage import ancestors
from kvist.repo.scan import Cursor
from kvist.store import MemoryStore, ObjectInfo, Range, Store
from kvist.testing.faults import CrashingStore, SimulatedCrash

LAYOUT: Final = Layout(page_size_tokens=4, n_layers=1, n_heads=1, head_dim=4, dtype="f16")
"""32 bytes a page half."""


def content(number: int) -> bytes:
    """The page half of that number; every one differs."""
    return bytes([number]) * LAYOUT.page_bytes


def name_of(number: int) -> str:
    """Its digest."""
    return format_digest("blake3", DIGESTS["blake3"](content(number)))


def manifest_of(numbers: Sequence[int]) -> Manifest:
    """One sequence; page i has content i as K and the next content as V: halves are shared, and may be equal."""
    halves = [name_of(number) for number in numbers]
    pages = tuple(PageEntry(ix, half, halves[(ix + 1) % len(halves)]) for ix, half in enumerate(halves))
    return Manifest(LAYOUT, pages, (LogicalSeq("s", tuple(range(len(pages)))),))


class _Process(CrashingStore):
    """One process' way to the store: may be interrupted at any call, as a scheduler would."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.calls_left = -1
        self.interrupt: Callable[[], None] = lambda: None

    @property
    def parallel(self) -> int:
        return 1  # or an example could not be run again

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        self._tick()
        return super().get(key, start=start, size=size)

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        self._tick()
        super().get_ranges(key, ranges)

    def head(self, key: str) -> ObjectInfo | None:
        self._tick()
        return super().head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._tick()
        return super().list(prefix)

    def _before(self) -> None:
        self._tick()
        super()._before()

    def _tick(self) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            self.interrupt()


class RepositoryModel(RuleBasedStateMachine):
    """Two processes on one repository, and what it should hold. `kvist.testing.repo` has the rules.

    Times and random names are counted out instead, so that an example can be run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = contextlib.ExitStack()
        count = itertools.count(1)
        chance = random.Random(0)
        for target, fake in (
            ("kvist.repo.batch.uuid.uuid4", lambda: uuid.UUID(int=chance.getrandbits(128))),
            ("kvist.repo.repository.time", SimpleNamespace(time_ns=lambda: next(count))),
            ("kvist.repo.naming.time", SimpleNamespace(time_ns=lambda: next(count))),
            ("kvist.repo.naming.secrets", SimpleNamespace(token_hex=lambda n: chance.randbytes(n).hex())),
        ):
            self.patches.enter_context(patch(target, fake))
        self.store = self.make_store()
        Repository.init(self.store).pages.close()
        self.processes = [self._open(), self._open()]
        self.snapshots: dict[str, tuple[Snapshot, tuple[int, ...]]] = {}
        self.refs: dict[tuple[RefKind, str], str] = {}
        self.burnt: set[str] = set()
        self.hurt: set[str] = set()
        self.pruned: set[str] = set()
        self.leases: dict[str, str] = {}  # cids by key
        self.cursor = Cursor()
        self.plan: gc.GcPlan | None = None
        self.numbers: dict[str, tuple[int, ...]] = {}  # contents by manifest
        self.orphans: set[str] = set()  # stored, but nobody was told; or left by a gc that died, without ancestors
        self.touched: set[tuple[RefKind, str]] = set()  # refs that the running operations may move

    def make_store(self) -> Store:
        """A new, empty store."""
        return MemoryStore()

    def teardown(self) -> None:
        """Check once more, and close."""
        with self.patches:
            self.check(0)
            for _, repo in self.processes:
                repo.pages.close()
            self.store.close()

    @abstractmethod
    def check(self, who: int) -> None:
        """Compare what a process sees with the model."""

    # -- processes -----------------------------------------------------------------------------------------------

    def _open(self) -> tuple[_Process, Repository]:
        process = _Process(self.store)
        return process, Repository.open(process)

    def _do(self, who: int, crash: tuple[int, bool] | None, act: Callable[[Repository], Any]) -> Any:
        """Let a process act, and perhaps die doing so; then a new one takes its place and ``None`` is returned."""
        process, repo = self.processes[who]
        if crash is not None:
            process.arm(crash[0], after=crash[1])
        try:
            return act(repo)
        except SimulatedCrash:
            repo.pages.close()
            self.processes[who] = self._open()
            return None
        finally:
            process.arm(None)
            process.calls_left = -1

    # -- the model -----------------------------------------------------------------------------------------------

    def _reachable(self) -> set[str]:
        return self._ancestors(self.refs.values())

    def _ancestors(self, tips: Iterable[str]) -> set[str]:
        return set(ancestors(tips, lambda cid: self.snapshots[cid][0].parents if cid in self.snapshots else ()))

    def _whole(self) -> set[str]:
        """Snapshots that must be whole: what refs reach, but for what was pruned and no ref names."""
        return self._reachable() - (self.pruned - set(self.refs.values()))

    def _live(self) -> set[str]:
        return self._pages(self._whole())

    def _kept(self) -> set[str]:
        """Snapshots whose records a gc keeps."""
        return self._ancestors([*self.refs.values(), *self.leases.values()])

    def _held(self) -> set[str]:
        """Those of them whose pages it keeps."""
        return self._kept() - (self.pruned - set(self.refs.values()) - set(self.leases.values()))

    def _pages(self, cids: Iterable[str]) -> set[str]:
        return {name_of(number) for cid in cids for number in self.snapshots[cid][1]}

    def _segments(self) -> list[segment.Segment]:
        infos = self.store.list(segment.PREFIX)
        return [segment.read_index(self.store, info.key, info.size, info.modified, "blake3") for info in infos]

    def _good(self) -> set[str]:
        """Digests of which the store holds a good copy, found without asking the repository."""
        good = set()
        for each in self._segments():
            data = self.store.get(each.key)
            for entry, raw in enumerate(each.digests):
                start, size = each.span(entry)
                if DIGESTS["blake3"](data[start : start + size]) == raw:
                    good.add(format_digest("blake3", raw))
        return good

    def _hurt_copies(self) -> set[str]:
        """Digests of pages of which some copy is damaged."""
        return {
            format_digest("blake3", raw)
            for each in self._segments()
            for entry, raw in enumerate(each.digests)
            if DIGESTS["blake3"](self.store.get(each.key, start=each.span(entry)[0], size=each.span(entry)[1])) != raw
        }

    def _chosen(self, pick: int) -> str | None:
        cids = list(self.snapshots)
        return cids[pick % len(cids)] if cids else None

    def _adopt(self) -> None:
        """Learn what operations that crashed or were interrupted have left: any of their effects, or none."""
        repo = Repository.open(self.store)
        stored = {cid: repo.objects.snapshot(cid) for cid, _ in repo.objects.snapshots()}
        for cid, snapshot in stored.items():
            if cid not in self.snapshots:
                self.orphans.add(cid)
                self.snapshots[cid] = snapshot, self.numbers[snapshot.manifests[0]]
        actual = {(ref.kind, ref.name): ref.cid for ref in repo.refs.all()}
        for key in self.refs.keys() | actual.keys():
            if self.refs.get(key) != actual.get(key):
                assert key in self.touched, f"{key} moved from {self.refs.get(key)} to {actual.get(key)} by itself"
        self.refs = actual
        self.burnt |= {name for name in repo.refs.names(RefKind.TAG) if (RefKind.TAG, name) not in actual}
        reachable = set(ancestors(self.refs.values(), lambda cid: self.snapshots[cid][0].parents))
        assert reachable <= stored.keys(), "a reachable snapshot is gone"
        assert self._kept() <= stored.keys(), "a snapshot under a lease is gone"
        self.pruned = set(marks.pruned(self.store))
        for cid in self.snapshots.keys() - stored.keys():
            del self.snapshots[cid]
        self.orphans |= {cid for cid in stored if not self._ancestors([cid]) <= stored.keys()}
        repo.pages.close()

    def _store_and_commit(
        self,
        repo: Repository,
        numbers: Sequence[int],
        parents: Sequence[str] | None,
        branch: str | None,
        replace: bool = False,
    ) -> Snapshot:
        manifest = manifest_of(numbers)
        self.numbers[manifest.cid] = tuple(numbers)
        put = repo.put_pages([content(number) for number in numbers])
        assert put.digests == [name_of(number) for number in numbers]
        self.hurt -= set(put.digests)
        return repo.commit([manifest], parents=parents, branch=branch, replace=replace)

    def _read(self, repo: Repository, digest: str) -> None:
        number = next(number for number in range(10) if name_of(number) == digest)
        if digest in self._good():
            assert repo.pages.get(digest) == content(number)
            return
        with contextlib.suppress(DamagedPage):
            repo.pages.get(digest)
            raise AssertionError("a damaged page was read as if it were whole")

    # -- helpers -------------------------------------------------------------------------------------------------

    def _interrupt(self, who: int, calls: int, act: Callable[[], object]) -> None:
        """At the ``calls``-th store call of a process let the other one ``act``; what goes wrong there is its own."""

        def interrupt() -> None:
            with contextlib.suppress(KvistError):
                act()

        process = self.processes[who][0]
        process.calls_left, process.interrupt = calls, interrupt

    def _planned(self, who: int) -> gc.GcPlan | None:
        broken = self._live() - self._good()
        try:
            plan = gc.plan(self.processes[who][1], min_age=0)
        except IntegrityError:
            assert broken
            return None
        assert not broken
        return plan

    def _has_segment(self, info: ObjectInfo) -> bool:
        return self.store.head(segment.PREFIX + info.key.split("/")[1]) is not None
