"""`RepositoryMachine`: any sequence of repository operations must agree with a plain model.

Two processes do them, crash, and interrupt each other; the store below rots.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvist.errors import AlreadyExists, Conflict, DamagedPage, IntegrityError, KvistError, MissingPage, NotFound
from kvist.hashing import DIGESTS
from kvist.ids import format_digest
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, PageEntry, RefKind, Repository, Snapshot, fsck, gc, lock, segment
from kvist.repo.lineage import ancestors
from kvist.store import MemoryStore, ObjectInfo, Range, Store
from kvist.testing.faults import CrashingStore, SimulatedCrash

LAYOUT: Final = Layout(page_size_tokens=4, n_layers=1, n_heads=1, head_dim=4, dtype="f16")
"""32 bytes a page half."""
_NO_PROCESS: Final = 2**31 - 1

_who = st.integers(0, 1)
_contents = st.lists(st.integers(0, 9), min_size=0, max_size=6)
_branches = st.sampled_from(["a", "a/b", "b", "abcdef0"])
_tags = st.sampled_from(["t", "t/u", "v1"])
_pick = st.integers(0, 1000)
_crash = st.none() | st.tuples(st.integers(1, 12), st.booleans())
_interrupt = st.none() | st.integers(1, 60)


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


class RepositoryMachine(RuleBasedStateMachine):
    """Two processes on one repository, against a model. Override `make_store` to run it on another store.

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
            ("kvist.repo.repository.secrets", SimpleNamespace(token_hex=lambda n: chance.randbytes(n).hex())),
        ):
            self.patches.enter_context(patch(target, fake))
        self.store = self.make_store()
        Repository.init(self.store).pages.close()
        self.processes = [self._open(), self._open()]
        self.snapshots: dict[str, tuple[Snapshot, tuple[int, ...]]] = {}
        self.refs: dict[tuple[RefKind, str], str] = {}
        self.burnt: set[str] = set()
        self.hurt: set[str] = set()
        self.plan: gc.GcPlan | None = None
        self.numbers: dict[str, tuple[int, ...]] = {}  # contents by manifest
        self.orphans: set[str] = set()  # stored, but nobody was told
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
            self._bury()
            self.processes[who] = self._open()
            return None
        finally:
            process.arm(None)
            process.calls_left = -1

    def _bury(self) -> None:
        """The dead process' lock names a process that is gone."""
        with contextlib.suppress(NotFound):
            record = json.loads(self.store.get(lock.KEY))
            self.store.put(lock.KEY, json.dumps(record | {"pid": _NO_PROCESS}).encode())

    # -- the model -----------------------------------------------------------------------------------------------

    def _reachable(self) -> set[str]:
        return self._ancestors(self.refs.values())

    def _ancestors(self, tips: Iterable[str]) -> set[str]:
        return set(ancestors(tips, lambda cid: self.snapshots[cid][0].parents if cid in self.snapshots else ()))

    def _live(self) -> set[str]:
        return self._pages(self._reachable())

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
        actual = {(ref.kind, ref.name): ref.cid for ref in repo.refs.all() if ref.cid is not None}
        for key in self.refs.keys() | actual.keys():
            if self.refs.get(key) != actual.get(key):
                assert key in self.touched, f"{key} moved from {self.refs.get(key)} to {actual.get(key)} by itself"
        self.refs = actual
        self.burnt |= {name for name in repo.refs.names(RefKind.TAG) if (RefKind.TAG, name) not in actual}
        reachable = set(ancestors(self.refs.values(), lambda cid: self.snapshots[cid][0].parents))
        assert reachable <= stored.keys(), "a reachable snapshot is gone"
        for cid in self.snapshots.keys() - stored.keys():
            del self.snapshots[cid]
        for cid, snapshot in stored.items():
            assert cid in self.orphans or set(snapshot.parents) <= stored.keys(), "a stored snapshot lost a parent"
        repo.pages.close()

    def _store_and_commit(
        self, repo: Repository, numbers: Sequence[int], parents: Sequence[str] | None, branch: str | None
    ) -> Snapshot:
        manifest = manifest_of(numbers)
        self.numbers[manifest.cid] = tuple(numbers)
        put = repo.put_pages([content(number) for number in numbers])
        assert put.digests == [name_of(number) for number in numbers]
        self.hurt -= set(put.digests)
        return repo.commit([manifest], parents=parents, branch=branch)

    # -- rules: writing ------------------------------------------------------------------------------------------

    @rule(who=_who, numbers=_contents, crash=_crash)
    def put(self, who: int, numbers: list[int], crash: tuple[int, bool] | None) -> None:
        """Store pages; heals what was found damaged."""
        put = self._do(who, crash, lambda repo: repo.put_pages([content(number) for number in numbers]))
        if put is not None:
            assert put.digests == [name_of(number) for number in numbers]
            assert put.new_bytes == put.new_pages * LAYOUT.page_bytes
            self.hurt -= set(put.digests)
            assert set(put.digests) <= self._good()

    @rule(
        who=_who,
        numbers=_contents,
        branch=st.none() | _branches,
        explicit=st.none() | st.lists(_pick, max_size=2),
        on_tip=st.booleans(),
        crash=_crash,
        interrupt=_interrupt,
    )
    def commit(
        self,
        who: int,
        numbers: list[int],
        branch: str | None,
        explicit: list[int] | None,
        on_tip: bool,
        crash: tuple[int, bool] | None,
        interrupt: int | None,
    ) -> None:
        """Commit, on a branch or detached, with given parents or the tip; perhaps a gc comes in between."""
        parents = None
        tip = self.refs.get((RefKind.BRANCH, branch)) if branch is not None else None
        if explicit is not None:
            chosen = [self._chosen(pick) for pick in explicit] + [tip] * on_tip
            parents = list(dict.fromkeys(cid for cid in chosen if cid is not None))
        if interrupt is not None and crash is None:  # not both: a writer that dies before it looks cannot take back
            other = self.processes[1 - who][1]
            self._interrupt(who, interrupt, lambda: gc.apply(other, gc.plan(other, min_age=0)))
        if branch is not None:
            self.touched.add((RefKind.BRANCH, branch))
        loses_tip = tip is not None and parents is not None and tip not in self._ancestors(parents)
        try:
            made = self._do(who, crash, lambda repo: self._store_and_commit(repo, numbers, parents, branch))
        except (Conflict, NotFound, MissingPage, DamagedPage):  # a gc may leave a damaged copy only, and find it so
            assert loses_tip or interrupt is not None or self.orphans.intersection(parents or ())
            made = None
        else:
            assert not loses_tip or made is None
        if made is not None:
            expected = parents if parents is not None else [tip] if tip is not None else []
            assert list(made.parents) == expected
            self.snapshots[made.cid] = made, tuple(numbers)
            if branch is not None:
                self.refs[RefKind.BRANCH, branch] = made.cid
        self._adopt()
        self.touched.clear()

    @rule(who=_who, pick=_pick, n=st.integers(1, 3), name=st.sampled_from(["f", "g"]), crash=_crash)
    def fork(self, who: int, pick: int, n: int, name: str, crash: tuple[int, bool] | None) -> None:
        """Fork, all or none."""
        cid = self._chosen(pick)
        if cid is None:
            return
        keys = [(RefKind.BRANCH, f"{name}/{i}") for i in range(n)]
        self.touched.update(keys)
        try:
            forks = self._do(who, crash, lambda repo: repo.fork(cid, n, name=name))
        except AlreadyExists:
            assert self.refs.keys() & keys
        except (Conflict, DamagedPage, MissingPage, NotFound):
            assert cid in self.orphans or not self._pages([cid]) <= self._good()
        else:
            if forks is not None:
                assert not self.refs.keys() & keys
                for key, fork in zip(keys, forks, strict=True):
                    assert fork.parents == (cid,)
                    self.snapshots[fork.cid] = fork, self.snapshots[cid][1]
                    self.refs[key] = fork.cid
        self._adopt()
        self.touched.clear()

    @rule(who=_who, pick=_pick, name=_branches, move=st.booleans(), crash=_crash, interrupt=_interrupt)
    def branch(
        self, who: int, pick: int, name: str, move: bool, crash: tuple[int, bool] | None, interrupt: int | None
    ) -> None:
        """Make or move a branch, perhaps to what a gc is about to delete."""
        self._name(
            who, RefKind.BRANCH, name, pick, crash, interrupt, lambda repo, cid: repo.branch(name, cid, move=move)
        )

    @rule(who=_who, pick=_pick, name=_tags, crash=_crash, interrupt=_interrupt)
    def tag(self, who: int, pick: int, name: str, crash: tuple[int, bool] | None, interrupt: int | None) -> None:
        """Tag, once and for all."""
        self._name(who, RefKind.TAG, name, pick, crash, interrupt, lambda repo, cid: repo.tag(name, cid))

    def _name(
        self,
        who: int,
        kind: RefKind,
        name: str,
        pick: int,
        crash: tuple[int, bool] | None,
        interrupt: int | None,
        act: Callable[[Repository, str], Any],
    ) -> None:
        cid = self._chosen(pick)
        if cid is None:
            return
        if interrupt is not None and crash is None:  # not both: a writer that dies before it looks cannot take back
            other = self.processes[1 - who][1]
            self._interrupt(who, interrupt, lambda: gc.apply(other, gc.plan(other, min_age=0)))
        self.touched.add((kind, name))
        burnt = set(self.burnt)
        try:
            ref = self._do(who, crash, lambda repo: act(repo, cid))
        except AlreadyExists:
            assert (kind, name) in self.refs or (kind is RefKind.TAG and name in burnt)
        except (DamagedPage, MissingPage):
            assert interrupt is not None or cid in self.orphans or not self._pages([cid]) <= self._good()
        except (Conflict, NotFound):
            assert interrupt is not None or cid in self.orphans
        else:
            if ref is not None:
                assert (ref.kind, ref.name, ref.cid) == (kind, name, cid)
                self.refs[kind, name] = cid
        self._adopt()
        if crash is None:
            assert self.burnt == burnt, "a tag that was never made has used up its name"
        self.touched.clear()

    @rule(who=_who, branch=_branches, tag=_tags, kind=st.sampled_from(RefKind), crash=_crash)
    def delete(self, who: int, branch: str, tag: str, kind: RefKind, crash: tuple[int, bool] | None) -> None:
        """Delete a ref."""
        name = tag if kind is RefKind.TAG else branch
        self.touched.add((kind, name))
        try:
            ref = self._do(who, crash, lambda repo: repo.delete_ref(kind, name))
        except NotFound:
            assert (kind, name) not in self.refs
        else:
            if ref is not None:
                assert self.refs.pop((kind, name)) == ref.cid
        self._adopt()
        self.touched.clear()

    @rule(who=_who)
    def reopen(self, who: int) -> None:
        """A process ends, another starts."""
        self.processes[who][1].pages.close()
        self.processes[who] = self._open()

    # -- rules: upkeep -------------------------------------------------------------------------------------------

    @rule(who=_who)
    def gc_plan(self, who: int) -> None:
        """Plan now, apply some rules later."""
        self.plan = self._planned(who)

    @precondition(lambda self: self.plan is not None)
    @rule(who=_who, crash=_crash, interrupt=_interrupt, numbers=_contents, branch=_branches)
    def gc_apply(
        self, who: int, crash: tuple[int, bool] | None, interrupt: int | None, numbers: list[int], branch: str
    ) -> None:
        """Apply an old plan; perhaps the other process commits meanwhile."""
        plan, self.plan = self.plan, None
        assert plan is not None
        if interrupt is not None:
            self.touched.add((RefKind.BRANCH, branch))

            def commit() -> None:
                made = self._store_and_commit(self.processes[1 - who][1], numbers, None, branch)
                self.snapshots[made.cid] = made, tuple(numbers)
                self.refs[RefKind.BRANCH, branch] = made.cid

            self._interrupt(who, interrupt, commit)
        broken = self._live() - self._good()
        try:
            self._do(who, crash, lambda repo: gc.apply(repo, plan))
        except IntegrityError:
            assert broken or interrupt is not None
        self._adopt()
        self.touched.clear()

    @rule(who=_who)
    def gc_all(self, who: int) -> None:
        """With nobody else at work, a gc leaves what refs reach and nothing more."""
        plan = self._planned(who)
        if plan is None:
            return
        repo = self.processes[who][1]
        done = gc.apply(repo, plan)
        assert (done.snapshots, done.manifests, done.delete_bytes) == (
            plan.snapshots,
            plan.manifests,
            plan.delete_bytes,
        )
        self.plan = None
        self._adopt()
        reachable = self._reachable()
        assert self.snapshots.keys() == reachable
        manifests = {cid for known in self.snapshots.values() for cid in known[0].manifests}
        assert {cid for cid, _ in repo.objects.manifests()} == manifests
        live = self._live()
        for each in self._segments():
            used = sum(format_digest("blake3", raw) in live for raw in each.digests)
            assert 2 * used >= len(each.digests), "a segment mostly of dead pages is left"
        assert not [info for info in self.store.list("damaged/") if not self._has_segment(info)]
        assert lock.holder(self.store) is None
        assert gc.plan(repo, min_age=0).is_empty

    @rule(who=_who, pick=_pick)
    def damage(self, who: int, pick: int) -> None:
        """Flip a bit of one page copy, then read that page."""
        segments = [each for each in self._segments() if each.digests]
        if not segments:
            return
        each = segments[pick % len(segments)]
        entry = pick % len(each.digests)
        digest = format_digest("blake3", each.digests[entry])
        start, size = each.span(entry)
        data = bytearray(self.store.get(each.key))
        if DIGESTS["blake3"](data[start : start + size]) != each.digests[entry]:
            return  # a second flip might heal it
        data[start + pick % size] ^= 1 << pick % 8
        self.store.put(each.key, data)
        if digest not in self._good():
            self.hurt.add(digest)
        self._read(self.processes[who][1], digest)

    def _read(self, repo: Repository, digest: str) -> None:
        number = next(number for number in range(10) if name_of(number) == digest)
        if digest in self._good():
            assert repo.pages.get(digest) == content(number)
            return
        with contextlib.suppress(DamagedPage):
            repo.pages.get(digest)
            raise AssertionError("a damaged page was read as if it were whole")

    @rule(who=_who)
    def check(self, who: int) -> None:
        """All that refs reach reads back; refs, log and fsck agree with the model."""
        repo = self.processes[who][1]
        live, good = self._live(), self._good()
        broken = live - good
        assert broken <= self.hurt, "a page was lost"
        report = fsck.check(repo)
        assert {finding.subject for finding in report.findings} == broken, report.findings
        assert {finding.code for finding in report.findings} <= {fsck.Code.DAMAGED_PAGE}
        assert {(ref.kind, ref.name): ref.cid for ref in repo.refs.all()} == self.refs
        for cid in self._reachable():
            snapshot, numbers = self.snapshots[cid]
            assert repo.snapshot(cid) == snapshot
            manifest = repo.manifest(snapshot.manifests[0])
            assert manifest == manifest_of(numbers)
            whole = [number for number in numbers if name_of(number) in good]
            outs = [bytearray(LAYOUT.page_bytes) for _ in whole]
            repo.get_pages([name_of(number) for number in whole], [memoryview(out) for out in outs])
            assert outs == [content(number) for number in whole]
        log = [snapshot.cid for snapshot in repo.log()]
        assert set(log) == self._reachable() and len(set(log)) == len(log)
        places = {cid: place for place, cid in enumerate(log)}
        assert all(places[cid] < places[p] for cid in log for p in self.snapshots[cid][0].parents)

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
