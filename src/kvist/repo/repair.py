"""repair: mends what fsck finds, as far as it can be mended. Plans, then applies; never deletes an only copy.

Knows what may be done about each finding. `kvist.repo.mending` does it.

Without a second copy: a damaged page copy is marked, so that it is never read again and the next put of the page heals
it; pages are saved out of a segment whose index is broken; a mark on a copy that is whole after all is taken back;
what is unreadable and protects nothing goes. With one: whatever is missing or damaged and the other repository has,
verified by digest. And a branch that nothing else can help may go back to its newest whole ancestor. Where nobody can
tell what a ref named it is not guessed: a person chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from kvist.errors import NotFound
from kvist.repo import fsck, lease, lineage
from kvist.repo.fsck import WRONG, Code, Finding
from kvist.repo.objects import SNAPSHOTS
from kvist.repo.reach import Reach
from kvist.repo.refs import Ref, RefKind
from kvist.repo.repository import Repository
from kvist.repo.salvage import Salvaged, salvage
from kvist.repo.scan import Progress

_UNKNOWN: Final = (Code.DAMAGED_REF, Code.DANGLING_REF, Code.DAMAGED_SNAPSHOT, Code.MISSING_PARENT)
"""Findings after which nobody can tell what a ref named, or what that continued."""


class Act(StrEnum):
    """What a step does. In the order in which steps are done; values never change meaning."""

    BREAK_LOCK = "break_lock"
    MARK = "mark_copy"
    UNMARK = "unmark_copy"
    SAVE = "save_page"
    FETCH_PAGE = "fetch_page"
    FETCH_OBJECT = "fetch_object"
    REWIND = "rewind_branch"
    DELETE = "delete_object"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do.

    Attributes:
        act: what.
        subject: the page's digest, the object's key, or the branch's name.
        where: the segment's key of a copy, or the cid that a branch is moved to; else ``""``.
        why: for people.
        size: bytes of a page.
        expected: of a branch, the cid that it names now.
        place: where a page to save lies.
    """

    act: Act
    subject: str
    where: str = ""
    why: str = ""
    size: int = 0
    expected: str = ""
    place: Salvaged | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return {"act": self.act, "subject": self.subject, "where": self.where, "why": self.why, "size": self.size}


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """What a repair would do.

    Attributes:
        steps: in the order in which they are done.
        findings: what fsck found.
        left: those of them that no step mends.
        candidates: where what a ref named or continued is unknown, and left so: whole snapshots that no ref reaches and
            none continues, the newest first. It may have been one of these, or what another ref reaches.
    """

    steps: tuple[Step, ...]
    findings: tuple[Finding, ...]
    left: tuple[Finding, ...]
    candidates: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.steps

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return {
            "steps": [step.to_json() for step in self.steps],
            "findings": [asdict(finding) for finding in self.findings],
            "left": [asdict(finding) for finding in self.left],
            "candidates": list(self.candidates),
        }


def plan(
    repo: Repository,
    *,
    source: Repository | None = None,
    rewind: bool = False,
    read_pages: bool = True,
    progress: Progress | None = None,
) -> RepairPlan:
    """Check a repository and say what can be mended. Changes nothing.

    Args:
        repo: what to mend.
        source: another repository, from which what is missing or damaged may be fetched.
        rewind: whether branches whose tip cannot be mended may go back to their newest whole ancestor; what they
            named is garbage then.
        read_pages: read and hash every page copy; else only what is known to be damaged already is mended.
        progress: called with bytes of pages read and in all.
    """
    return _Planner(repo, source, rewind).plan(read_pages, progress)


class _Planner:
    def __init__(self, repo: Repository, source: Repository | None, rewind: bool) -> None:
        self.repo, self.source, self.rewind = repo, source, rewind
        self.leased: frozenset[str] = frozenset()
        self.steps: list[Step] = []
        self.mended: set[tuple[Code, str]] = set()

    def plan(self, read_pages: bool, progress: Progress | None) -> RepairPlan:
        report = fsck.check(self.repo, read_pages=read_pages, progress=progress)
        if self.source is not None:
            self.source.pages.refresh()
        self._copies(report)
        tips, leases = self._tips(), lease.read(self.repo.store)
        self.leased = leases.cids
        reach = Reach(self.repo, self.source, report.damaged, self._whole_after_all())
        reach.follow([*tips.values(), *self.leased])
        self._save(reach)
        self._fetch(reach, tips)
        lost = reach.lost | reach.pages.keys()
        if self.rewind:
            lost -= self._rewind(reach, tips, lost)
        self._delete(report.findings, is_whole=not lost and not leases.unreadable)
        steps = tuple(sorted(self.steps, key=lambda step: [*Act].index(step.act)))
        left = tuple(one for one in report.findings if (one.code, one.subject) not in self.mended)
        candidates = self._orphans(reach, tips) if any(one.code in _UNKNOWN for one in left) else ()
        return RepairPlan(steps, tuple(report.findings), left, candidates)

    def _mend(self, subjects: Iterable[str], *codes: Code) -> None:
        self.mended |= {(code, subject) for subject in subjects for code in codes}

    # -- pages ---------------------------------------------------------------------------------------------------

    def _copies(self, report: fsck.FsckReport) -> None:
        for copy in report.damaged:
            why = "its bytes do not hash to its digest: the next put heals it"
            self.steps.append(Step(Act.MARK, copy.digest, copy.segment, why))
            self._mend([copy.digest], Code.DAMAGED_COPY)

    def _whole_after_all(self) -> list[tuple[str, str]]:
        """Marked copies that are whole: the mark came of a wrong byte on the way, or the disk has given it back."""
        whole = []
        segments = {segment.key: segment for segment in self.repo.pages.segments()}
        for key, digest in self.repo.pages.damaged_places():
            segment, names = segments[key], self.repo.pages.names(segments[key])
            if digest not in names:
                continue
            start, size = segment.span(names.index(digest))
            try:
                Salvaged(key, start, size, digest).read(self.repo)
            except (NotFound, *WRONG):
                continue
            whole.append((key, digest))
            self.steps.append(Step(Act.UNMARK, digest, key, "it is marked as damaged, and whole"))
            self._mend([digest], Code.DAMAGED_PAGE)
        return whole

    def _save(self, reach: Reach) -> None:
        """Pages that any manifest names and only broken segments hold, also those that no ref needs."""
        broken = self.repo.pages.broken_segments()
        if not broken:
            return
        wanted = self._homeless() | reach.pages
        for key in sorted(broken):
            for found in salvage(self.repo, key, wanted, set(wanted.values())):
                if wanted.get(found.digest) == found.size:
                    del wanted[found.digest]
                    why = "lies in a segment whose index is broken"
                    self.steps.append(Step(Act.SAVE, found.digest, key, why, found.size, place=found))
                    self._have(reach, found.digest)

    def _homeless(self) -> dict[str, int]:
        """Size by digest of the pages that some manifest names and no readable segment holds."""
        found: dict[str, int] = {}
        for cid, _ in self.repo.objects.manifests():
            try:
                manifest = self.repo.objects.manifest(cid)
                size = manifest.layout.page_bytes
                found |= {digest: size for digest in manifest.digests if self.repo.pages.size(digest) is None}
            except (NotFound, *WRONG):
                continue
        return found

    def _have(self, reach: Reach, digest: str) -> None:
        reach.pages.pop(digest, None)
        self._mend([digest], Code.MISSING_PAGE, Code.DAMAGED_PAGE)

    # -- from another repository ---------------------------------------------------------------------------------

    def _fetch(self, reach: Reach, tips: dict[str, str]) -> None:
        if self.source is None:
            return
        for cid, key in reach.fetched.items():
            self.steps.append(
                Step(Act.FETCH_OBJECT, key, why=f"is missing or damaged, and whole in {self.source.store.url}")
            )
            self._mend([cid], Code.DAMAGED_SNAPSHOT, Code.MISSING_PARENT, Code.MISSING_MANIFEST, Code.DAMAGED_MANIFEST)
        self._mend((name for name, cid in tips.items() if cid in reach.fetched), Code.DANGLING_REF)
        if self.source.config.page_identity != self.repo.config.page_identity:
            return  # its pages have other names
        for digest, size in list(reach.pages.items()):
            if self.source.pages.size(digest) == size:
                why = f"is missing or damaged, and lies in {self.source.store.url}"
                self.steps.append(Step(Act.FETCH_PAGE, digest, why=why, size=size))
                self._have(reach, digest)

    # -- refs ----------------------------------------------------------------------------------------------------

    def _tips(self) -> dict[str, str]:
        """Cid by what fsck calls the ref."""
        refs = [ref for ref in self.repo.refs.look() if isinstance(ref, Ref)]
        return {f"{ref.kind.noun} {ref.name}": ref.cid for ref in refs}

    def _rewind(self, reach: Reach, tips: dict[str, str], lost: set[str]) -> set[str]:
        """Branches that lost something, to what they were before; returns what is then no longer needed."""
        broken = reach.broken(lost)
        freed = set()
        for subject in sorted(name for name, cid in tips.items() if cid in broken):
            kind, _, name = subject.partition(" ")
            target = self._newest_whole(reach, tips[subject], broken) if kind == RefKind.BRANCH.noun else None
            if target is not None:
                why = "what it names is not whole: it goes back to the newest snapshot that is"
                self.steps.append(Step(Act.REWIND, name, target, why, expected=tips[subject]))
                freed.add(subject)
        kept = Reach(self.repo, self.source, reach.damaged, reach.whole)
        kept.follow([*self.leased, *(cid for subject, cid in tips.items() if subject not in freed)])
        needed = kept.lost | kept.pages.keys()
        gone = lost - needed
        self.mended |= {(code, name) for code in Code for name in gone}
        return gone

    def _newest_whole(self, reach: Reach, tip: str, broken: set[str]) -> str | None:
        """The newest whole ancestor; of a tip whose own record is lost, nobody knows any."""
        past = {cid: reach.snapshots[cid] for cid in self._past(reach, [tip]) if cid in reach.snapshots}
        return next((cid for cid in lineage.newest_first(past) if cid not in broken), None)

    def _orphans(self, reach: Reach, tips: dict[str, str]) -> tuple[str, ...]:
        """Whole snapshots that no ref reaches and nothing continues, the newest first."""
        reached = set(self._past(reach, tips.values()))
        found = Reach(self.repo, None, reach.damaged, reach.whole)
        found.follow(cid for cid, _ in self.repo.objects.snapshots() if cid not in reached)
        broken = found.broken(found.lost | found.pages.keys())
        continued = {parent for snapshot in found.snapshots.values() for parent in snapshot.parents}
        without = broken | continued | reached
        return tuple(cid for cid in lineage.newest_first(found.snapshots) if cid not in without)

    def _past(self, reach: Reach, tips: Iterable[str]) -> Iterator[str]:
        """What some snapshots descend from, as far as it is known."""
        return lineage.ancestors(tips, lambda cid: reach.snapshots[cid].parents if cid in reach.snapshots else ())

    # -- what goes -----------------------------------------------------------------------------------------------

    def _delete(self, findings: Iterable[Finding], *, is_whole: bool) -> None:
        for finding in findings:
            act = Act.BREAK_LOCK if finding.code is Code.DAMAGED_LOCK else Act.DELETE
            match finding.code:
                case Code.DAMAGED_SEGMENT if is_whole:
                    why = "its index is broken, and what it held lies elsewhere or is needed by nobody"
                case Code.STRAY_OBJECT if _is_snapshot(finding.subject):
                    why = "it is not what its key says, and no ref reaches it"
                case Code.DAMAGED_LOCK:
                    why = "nobody can read it; make sure that no gc runs"
                case Code.DAMAGED_LEASE:
                    why = "nobody can read it; make sure that nobody holds it"
                case Code.DAMAGED_SIGNATURE:
                    why = "nobody can verify it"
                case _:
                    continue
            self.steps.append(Step(act, finding.subject, why=why))
            self._mend([finding.subject], finding.code)


def _is_snapshot(key: str) -> bool:
    """Whether a stray object is one of ours; a file that somebody else has put there is not ours to delete."""
    name = key.removeprefix(SNAPSHOTS)
    return name != key and len(name) == 64 and not name.strip("0123456789abcdef")
