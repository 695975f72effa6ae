"""Any histories on two repositories, and any pushes and pulls between them: each side holds, whole, what refs reach."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvist.errors import AlreadyExists, Conflict, DamagedPage, IntegrityError, InvalidInput, NotFound
from kvist.hashing import DIGESTS
from kvist.ids import format_digest
from kvist.repo import RefKind, Repository, Snapshot, fsck, gc, lease, transfer
from kvist.repo.lineage import ancestors
from kvist.store import LocalStore, MemoryStore, Store
from kvist.testing.faults import CrashingStore, SimulatedCrash
from kvist.testing.repo_model import LAYOUT, content, manifest_of, name_of

from .making import read_back

_side = st.integers(0, 1)
_pick = st.integers(0, 1000)
_branch = st.sampled_from(["a", "b", "c/d"])
_tag = st.sampled_from(["t", "u"])
_numbers = st.lists(st.integers(0, 12), max_size=5)


class TransferMachine(RuleBasedStateMachine):
    """Two repositories; sides are 0 and 1."""

    def make_stores(self) -> list[Store]:
        return [MemoryStore(), MemoryStore()]

    @initialize()
    def start(self) -> None:
        self.stores = self.make_stores()
        self.repos = [Repository.init(store) for store in self.stores]
        self.known: dict[str, tuple[Snapshot, tuple[int, ...]]] = {}
        self.hurt: list[set[str]] = [set(), set()]

    def teardown(self) -> None:
        for repo in getattr(self, "repos", ()):
            repo.close()

    # -- histories -----------------------------------------------------------------------------------------------

    @rule(side=_side, branch=_branch, numbers=_numbers, merge=st.none() | _pick)
    def commit(self, side: int, branch: str, numbers: list[int], merge: int | None) -> None:
        repo = self.repos[side]
        repo.put_pages([content(number) for number in numbers])
        self.hurt[side] -= set(map(name_of, numbers))
        tip = repo.refs.read(RefKind.BRANCH, branch)
        parents = [tip.cid] if tip is not None and tip.cid is not None else []
        others = [ref.cid for ref in repo.refs.all() if ref.cid is not None and ref.cid not in parents]
        if merge is not None and others:
            parents.append(others[merge % len(others)])
        try:
            made = repo.commit([manifest_of(numbers)], branch=branch, parents=parents)
        except DamagedPage:
            assert self.hurt[side]
            return
        self.known[made.cid] = made, tuple(numbers)

    @rule(side=_side, pick=_pick, name=_branch)
    def fork(self, side: int, pick: int, name: str) -> None:
        repo = self.repos[side]
        cids = sorted({ref.cid for ref in repo.refs.all() if ref.cid is not None})
        if not cids:
            return
        cid = cids[pick % len(cids)]
        try:
            (made,) = repo.fork(cid, 1, name=f"f{pick % 3}/{name}")
        except AlreadyExists:
            return
        except DamagedPage:
            assert self.hurt[side]
            return
        self.known[made.cid] = made, self.known[cid][1]

    @rule(side=_side, name=_tag, branch=_branch)
    def tag(self, side: int, name: str, branch: str) -> None:
        try:
            self.repos[side].tag(name, branch)
        except (NotFound, AlreadyExists):
            return
        except DamagedPage:
            assert self.hurt[side]

    @rule(side=_side, pick=_pick, tags=st.booleans())
    def delete(self, side: int, pick: int, tags: bool) -> None:
        refs = [ref for ref in self.repos[side].refs.all() if tags or ref.kind is RefKind.BRANCH]
        if refs:
            chosen = refs[pick % len(refs)]
            self.repos[side].delete_ref(chosen.kind, chosen.name)

    @rule(side=_side)
    def collect(self, side: int) -> None:
        repo = self.repos[side]
        try:
            gc.apply(repo, gc.plan(repo, min_age=0))
        except IntegrityError:
            assert self.hurt[side]
            return
        assert {cid for cid, _ in repo.objects.snapshots()} == repo.reachable().keys()

    @rule(side=_side, pick=_pick)
    def damage(self, side: int, pick: int) -> None:
        """Flip a bit of one page copy, and read it."""
        repo, store = self.repos[side], self.stores[side]
        segments = repo.pages.segments()
        if not segments:
            return
        one = segments[pick % len(segments)]
        entry = pick % len(one.digests)
        start, size = one.span(entry)
        data = bytearray(store.get(one.key))
        if DIGESTS["blake3"](data[start : start + size]) != one.digests[entry]:
            return
        data[start + pick % size] ^= 1 << pick % 8
        store.put(one.key, data)
        digest = format_digest("blake3", one.digests[entry])
        repo.pages.verify([digest])
        if repo.pages.size(digest) is None:
            self.hurt[side].add(digest)

    # -- transfers -----------------------------------------------------------------------------------------------

    @rule(
        side=_side,
        picks=st.lists(_pick, min_size=1, max_size=3) | st.none(),
        rename=st.booleans(),
        force=st.booleans(),
        heal=st.booleans(),
        pages=st.integers(1, 4),
        crash=st.none() | st.tuples(st.integers(1, 14), st.booleans()),
        late=st.none() | st.tuples(_branch, _numbers),
    )
    def transfer(
        self,
        side: int,
        picks: list[int] | None,
        rename: bool,
        force: bool,
        heal: bool,
        pages: int,
        crash: tuple[int, bool] | None,
        late: tuple[str, list[int]] | None,
    ) -> None:
        """From ``side`` to the other: some refs or all of them; perhaps it dies, or the target moves meanwhile."""
        source, goal = self.repos[side], 1 - side
        refs = [*source.refs.all()]
        names = sorted({ref.name for ref in refs})
        revs = [names[pick % len(names)] for pick in picks] if picks is not None and names else []
        if rename and revs:
            cids = sorted(source.reachable())
            revs.append(f"{cids[(picks or [0])[0] % len(cids)]}:{names[0]}x")
        crashing = CrashingStore(self.stores[goal])
        target = Repository.open(crashing)
        before = {(ref.kind, ref.name): ref.cid for ref in target.refs.all()}
        try:
            plan = transfer.plan(source, target, revs, everything=not revs, force=force, heal=heal)
            for move in plan.moves:
                self._require_sense(source, move, before, force)
            if late is not None:
                self.commit(goal, late[0], late[1], None)
                before = {(ref.kind, ref.name): ref.cid for ref in target.refs.all()}
            if crash is not None:
                crashing.arm(crash[0], after=crash[1])
            done = transfer.apply(source, target, plan, batch_bytes=pages * LAYOUT.page_bytes)
        except SimulatedCrash:
            target.pages.close()
            self.repos[goal].pages.refresh()
            self.repos[goal].objects.forget()
            gone = [info.key for info in self.stores[goal].list(lease.PREFIX)]
            self.stores[goal].delete(gone)  # that of the dead runs out
            self._reread(goal)
            return
        except (Conflict, AlreadyExists, InvalidInput) as error:
            assert not isinstance(error, InvalidInput) or (rename and "two snapshots" in str(error))
            moved = {(ref.kind, ref.name): ref.cid for ref in target.refs.all()}
            assert moved == before, "a refusal moves nothing"
            target.pages.close()
            return
        except DamagedPage:
            assert self.hurt[side] or self.hurt[goal]
            target.pages.close()
            return
        finally:
            self.repos[goal].pages.refresh()
        target.pages.close()
        assert not [*self.stores[goal].list(lease.PREFIX)] and not [*self.stores[side].list(lease.PREFIX)]
        if not plan.is_empty:
            assert done.page_bytes == done.pages * LAYOUT.page_bytes
        self._reread(goal)
        now = {(ref.kind, ref.name): ref.cid for ref in self.repos[goal].refs.all()}
        for move in plan.moves:
            cid = now[move.kind, move.name]
            assert cid is not None and move.cid in ancestors([cid], lambda each: self.known[each][0].parents)
            assert cid == move.cid or move.act is transfer.Act.KEEP or late is not None
            assert not self._needs([move.cid]) & self.hurt[goal], "what was damaged came anew"
        if not late and not self.hurt[goal]:
            again = transfer.plan(source, self.repos[goal], revs, everything=not revs, force=False, heal=True)
            assert again.is_empty, "there is nothing left to move"

    def _require_sense(
        self, source: Repository, move: transfer.RefMove, before: dict[tuple[RefKind, str], str | None], force: bool
    ) -> None:
        old = before.get((move.kind, move.name))
        if move.act is transfer.Act.CREATE:
            assert old is None
        elif move.act is transfer.Act.FORWARD:
            assert old in ancestors([move.cid], lambda cid: self.known[cid][0].parents)
        elif move.act is transfer.Act.REPLACE:
            assert force and move.kind is RefKind.BRANCH

    def _needs(self, tips: list[str]) -> set[str]:
        reached = ancestors(tips, lambda cid: self.known[cid][0].parents)
        return {name_of(number) for cid in reached for number in self.known[cid][1]}

    def _reread(self, side: int) -> None:
        """Learn which damage is healed."""
        good = {digest for digest in self.hurt[side] if self.repos[side].pages.size(digest) is not None}
        self.hurt[side] -= good

    # -- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def each_side_is_whole(self) -> None:
        for repo, hurt in zip(getattr(self, "repos", ()), getattr(self, "hurt", ()), strict=True):
            report = fsck.check(repo)
            broken = {finding.subject for finding in report.findings}
            assert broken <= hurt, report.findings
            for cid in repo.reachable():
                data = [half for number in self._halves(cid) for half in (content(number),)]
                if not hurt:
                    assert read_back(repo, cid) == data

    def _halves(self, cid: str) -> list[int]:
        numbers = self.known[cid][1]
        return [number for i in range(len(numbers)) for number in (numbers[i], numbers[(i + 1) % len(numbers)])]


class LocalTransferMachine(TransferMachine):
    def make_stores(self) -> list[Store]:
        self.directory = tempfile.TemporaryDirectory()
        return [LocalStore(Path(self.directory.name) / name, durable=False) for name in "ab"]

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


def run(machine: type[TransferMachine], examples: int, steps: int) -> None:
    checks = [*HealthCheck]
    chosen = settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks)
    run_state_machine_as_test(machine, settings=chosen)


def test_any_transfers_in_memory() -> None:
    run(TransferMachine, 20, 30)


def test_any_transfers_on_disk() -> None:
    run(LocalTransferMachine, 4, 20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_transfers_for_long() -> None:
    run(TransferMachine, 300, 60)
