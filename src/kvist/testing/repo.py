"""`RepositoryMachine`: any sequence of repository operations must agree with a plain model.

Two processes do them, crash, and interrupt each other; the store below rots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kvist.errors import AlreadyExists, Conflict, DamagedPage, IntegrityError, MissingPage, NotFound
from kvist.hashing import DIGESTS
from kvist.ids import format_digest
from kvist.repo import RefKind, Repository, fsck, gc, lease, lock, mending, prune, repair
from kvist.testing.repo_model import LAYOUT, RepositoryModel, content, manifest_of, name_of

_who = st.integers(0, 1)
_contents = st.lists(st.integers(0, 9), min_size=0, max_size=6)
_branches = st.sampled_from(["a", "a/b", "b", "abcdef0"])
_tags = st.sampled_from(["t", "t/u", "v1"])
_pick = st.integers(0, 1000)
_crash = st.none() | st.tuples(st.integers(1, 12), st.booleans())
_interrupt = st.none() | st.integers(1, 60)


class RepositoryMachine(RepositoryModel):
    """Rules and checks. Override `make_store` to run it on another store."""

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
        replace=st.booleans(),
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
        replace: bool,
        crash: tuple[int, bool] | None,
        interrupt: int | None,
    ) -> None:
        """Commit, on a branch, in place of one, or detached, with given parents or the tip; perhaps a gc comes too."""
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
        loses_tip = not replace and tip is not None and parents is not None and tip not in self._ancestors(parents)
        try:
            made = self._do(who, crash, lambda repo: self._store_and_commit(repo, numbers, parents, branch, replace))
        except (Conflict, NotFound, MissingPage, DamagedPage):  # a gc may leave a damaged copy only, and find it so
            assert loses_tip or interrupt is not None or self.orphans.intersection(parents or ())
            made = None
        else:
            assert not loses_tip or made is None
        if made is not None:
            expected = parents if parents is not None else [tip] if tip is not None and not replace else []
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
            assert cid in self.orphans | self.pruned or not self._pages([cid]) <= self._good()
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
            assert interrupt is not None or cid in self.orphans | self.pruned
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
        assert self.snapshots.keys() == self._kept()
        manifests = {name for cid in self._held() for name in self.snapshots[cid][0].manifests}
        assert {cid for cid, _ in repo.objects.manifests()} == manifests
        assert self.pruned <= self._kept(), "a mark is left of a snapshot that is gone"
        live = self._pages(self._held())
        for each in self._segments():
            used = sum(format_digest("blake3", raw) in live for raw in each.digests)
            assert 2 * used >= len(each.digests), "a segment mostly of dead pages is left"
        assert not [info for info in self.store.list("damaged/") if not self._has_segment(info)]
        assert lock.holder(self.store) is None
        assert gc.plan(repo, min_age=0).is_empty

    @rule(who=_who, last=st.integers(1, 3), branch=_branches | st.just("*"), crash=_crash, interrupt=_interrupt)
    def prune(self, who: int, last: int, branch: str, crash: tuple[int, bool] | None, interrupt: int | None) -> None:
        """Thin a branch or all, while the other process perhaps collects."""
        if interrupt is not None and crash is None:
            other = self.processes[1 - who][1]
            self._interrupt(who, interrupt, lambda: gc.apply(other, gc.plan(other, min_age=0)))
        before = set(self.pruned)
        named = {*self.refs.values(), *self.leases.values()}
        rules = prune.Rules(branches=(branch,), last=last)
        done = self._do(who, crash, lambda repo: prune.apply(repo, prune.plan(repo, rules)))
        self._adopt()
        new = self.pruned - before
        assert not new & named, "a tip, or what a lease holds, was pruned"
        assert new <= self._reachable()
        if done is not None:
            assert new == set(done.snapshots) - before
            assert prune.plan(self.processes[who][1], rules).is_empty

    @rule(who=_who, pick=_pick, crash=_crash, interrupt=_interrupt)
    def hold(self, who: int, pick: int, crash: tuple[int, bool] | None, interrupt: int | None) -> None:
        """Take a lease, perhaps on what a gc is about to delete. One whose holder dies holds on."""
        cid = self._chosen(pick)
        if cid is None or cid in self.orphans | self.pruned:
            return
        if interrupt is not None and crash is None:  # not both: who dies before it looks does not know what it has
            other = self.processes[1 - who][1]
            self._interrupt(who, interrupt, lambda: gc.apply(other, gc.plan(other, min_age=0)))
        with contextlib.suppress(Conflict):
            self._do(who, crash, lambda repo: lease.hold(repo, cids=[cid]))
        for one in lease.read(self.store).live:
            self.leases.setdefault(one.key, cid)
        self._adopt()

    @precondition(lambda self: self.leases)
    @rule(pick=_pick)
    def release(self, pick: int) -> None:
        """A lease ends."""
        key = sorted(self.leases)[pick % len(self.leases)]
        self.store.delete([key])
        del self.leases[key]

    @rule(who=_who, crash=_crash)
    def repair(self, who: int, crash: tuple[int, bool] | None) -> None:
        """Mend what can be mended alone: nothing whole is lost, and no damage is left that nobody knows of."""
        good = self._good()
        done = self._do(who, crash, lambda repo: mending.apply(repo, repair.plan(repo)))
        assert good <= self._good()
        if done is not None:
            assert not done.failed
            assert {finding.code for finding in done.left} <= {fsck.Code.DAMAGED_PAGE}
            codes = {finding.code for finding in fsck.check(self.processes[who][1]).findings}
            assert fsck.Code.DAMAGED_COPY not in codes
        for one in lease.read(self.store).live:
            if one.key not in self.leases:  # of a repair that died
                self.store.delete([one.key])

    @rule(who=_who)
    def check_on(self, who: int) -> None:
        """Go on with a check that was stopped: it finds only what is."""
        report = fsck.check(self.processes[who][1], cursor=self.cursor, max_duration=0)
        broken = self._live() - self._good()
        found = {finding.subject for finding in report.findings if finding.code is fsck.Code.DAMAGED_PAGE}
        assert found <= broken
        assert {finding.code for finding in report.findings} <= {fsck.Code.DAMAGED_PAGE, fsck.Code.DAMAGED_COPY}

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

    @rule(who=_who)
    def check(self, who: int) -> None:
        """All that refs reach reads back; refs, log and fsck agree with the model."""
        repo = self.processes[who][1]
        live, good = self._live(), self._good()
        broken = live - good
        assert broken <= self.hurt, "a page was lost"
        report = fsck.check(repo)
        known = {fsck.Code.DAMAGED_PAGE: broken, fsck.Code.DAMAGED_COPY: self._hurt_copies()}
        for finding in report.findings:
            assert finding.subject in known[finding.code], report.findings
        assert broken == {one.subject for one in report.findings if one.affects}, report.findings
        assert {(ref.kind, ref.name): ref.cid for ref in repo.refs.all()} == self.refs
        for cid in self._reachable():
            snapshot, numbers = self.snapshots[cid]
            assert repo.snapshot(cid) == snapshot
            if cid not in self._whole():
                continue
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
