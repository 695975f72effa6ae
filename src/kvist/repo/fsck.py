"""fsck: checks that whatever a ref reaches is there and whole. Reads everything, changes nothing.

The one exception to "changes nothing": a page copy found damaged is marked, so that the next put heals it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

from kvist.errors import KvistError, Locked, NotFound
from kvist.ids import parse_cid
from kvist.repo import lock
from kvist.repo.objects import MANIFESTS, SNAPSHOTS
from kvist.repo.refs import RefKind
from kvist.repo.repository import Repository
from kvist.repo.snapshot import Snapshot

_TRIES: Final = 5
"""How often a check with findings is repeated because refs moved under it."""


class Code(StrEnum):
    """What is wrong. Values never change meaning."""

    DAMAGED_REF = "damaged_ref"
    DANGLING_REF = "dangling_ref"
    DAMAGED_SNAPSHOT = "damaged_snapshot"
    MISSING_PARENT = "missing_parent"
    MISSING_MANIFEST = "missing_manifest"
    DAMAGED_MANIFEST = "damaged_manifest"
    MISSING_PAGE = "missing_page"
    DAMAGED_PAGE = "damaged_page"
    WRONG_PAGE_SIZE = "wrong_page_size"
    DAMAGED_SEGMENT = "damaged_segment"
    DAMAGED_LOCK = "damaged_lock"
    STRAY_OBJECT = "stray_object"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: what kind.
        subject: the ref, cid, digest or key concerned.
        detail: what was expected and what came.
        affects: cids of reachable snapshots that cannot be checked out whole because of it.
        mend: what to do.
    """

    code: Code
    subject: str
    detail: str
    affects: tuple[str, ...] = ()
    mend: str = ""


@dataclass(slots=True)
class FsckReport:
    """Result of a check.

    Attributes:
        findings: all that is wrong; empty: clean.
        snapshots: snapshots checked.
        pages: distinct page halves they name.
        read_pages: whether every page was read and hashed, or only looked up.
    """

    findings: list[Finding] = field(default_factory=list)
    snapshots: int = 0
    pages: int = 0
    read_pages: bool = False

    @property
    def is_clean(self) -> bool:
        """No finding."""
        return not self.findings

    @property
    def is_whole(self) -> bool:
        """No finding that touches what a ref reaches."""
        return not any(finding.affects for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return {"clean": self.is_clean, **asdict(self)}


def check(
    repo: Repository, *, read_pages: bool = True, progress: Callable[[int, int], None] | None = None
) -> FsckReport:
    """Check a repository.

    Args:
        repo: what to check; others may write to it meanwhile.
        read_pages: read and hash every page that a snapshot names, instead of only looking it up.
        progress: called with pages read and pages in all.
    """
    for _ in range(_TRIES - 1):
        before = ref_etags(repo)
        report = _Check(repo, read_pages, progress).run()
        if report.is_whole or ref_etags(repo) == before:
            return report
    return _Check(repo, read_pages, progress).run()


def ref_etags(repo: Repository) -> list[tuple[str, str]]:
    """Every ref's record and its etag, which changes when the ref does.

    What was reachable when a check began may then rightly be gone by its end, and the other way round.
    """
    return [(info.key, info.etag) for kind in RefKind for info in repo.store.list(kind.value)]


class _Check:
    def __init__(self, repo: Repository, read_pages: bool, progress: Callable[[int, int], None] | None) -> None:
        self.repo, self.progress = repo, progress
        self.report = FsckReport(read_pages=read_pages)
        self.snapshots: dict[str, Snapshot] = {}
        self.damaged: set[str] = set()  # cids of snapshots
        self.users: dict[str, set[str]] = {}  # page digest -> snapshots that need it

    def run(self) -> FsckReport:
        self.repo.objects.forget()
        reachable = self._walk(self._tips())
        self._strays()
        self.repo.pages.refresh()  # after the refs were read: what they name was stored before them
        self._manifests(reachable)
        self._segments()
        self._pages()
        self._lock()
        self.report.snapshots = len(self.snapshots)
        return self.report

    def _find(self, code: Code, subject: str, detail: object, affects: set[str] | None = None, mend: str = "") -> None:
        self.report.findings.append(Finding(code, subject, str(detail), tuple(sorted(affects or ())), mend))

    def _tips(self) -> list[str]:
        tips = []
        for kind in RefKind:
            for name in self.repo.refs.names(kind):
                subject = f"{kind.noun} {name}"
                try:
                    ref = self.repo.refs.read(kind, name)
                except KvistError as error:
                    self._find(Code.DAMAGED_REF, subject, error, {subject}, error.hint or "")
                    continue
                if ref is None or ref.cid is None:
                    continue
                if self._load(ref.cid, subject):
                    tips.append(ref.cid)
                elif ref.cid not in self.damaged:
                    mend = f"kvist {kind.noun} --delete {name}"
                    self._find(Code.DANGLING_REF, subject, f"names {ref.cid}, which is not stored", {ref.cid}, mend)
        return tips

    def _load(self, cid: str, user: str) -> bool:
        """Read a snapshot that ``user`` names; say so if it is damaged, not if it is missing."""
        if cid in self.snapshots:
            return True
        try:
            self.snapshots[cid] = self.repo.objects.snapshot(cid)
        except NotFound:
            return False
        except KvistError as error:
            if cid not in self.damaged:
                self.damaged.add(cid)
                mend = "delete the refs that reach it, then kvist gc"
                self._find(Code.DAMAGED_SNAPSHOT, cid, f"{error}; {user} names it", {cid}, mend)
            return False
        return True

    def _walk(self, tips: list[str]) -> set[str]:
        """Snapshots that the tips reach."""
        reached: set[str] = set()
        waiting = list(tips)
        while waiting:
            cid = waiting.pop()
            if cid in reached:
                continue
            reached.add(cid)
            for parent in self.snapshots[cid].parents:
                if self._load(parent, cid):
                    waiting.append(parent)
                elif parent not in self.damaged:
                    mend = "pull it from a copy, or delete the refs that reach it"
                    self._find(Code.MISSING_PARENT, parent, f"is a parent of {cid} and not stored", {cid}, mend)
        return reached

    def _strays(self) -> None:
        """Snapshots that no ref reaches and that are not what their key says, and objects under keys that are no cid.

        They harm nobody. The content of manifests that no ref reaches is not read.
        """
        for prefix in (SNAPSHOTS, MANIFESTS):
            for info in self.repo.store.list(prefix):
                cid = ""
                try:
                    cid = parse_cid("sha256:" + info.key.removeprefix(prefix))
                    if prefix == SNAPSHOTS and cid not in self.snapshots:
                        self.repo.objects.snapshot(cid)
                except NotFound:
                    continue
                except KvistError as error:
                    if cid not in self.damaged:
                        mend = "no ref reaches it: kvist gc deletes it" if cid else "not one of kvist's: delete it"
                        self._find(Code.STRAY_OBJECT, info.key, error, mend=mend)

    def _manifests(self, reachable: set[str]) -> None:
        users: dict[str, set[str]] = {}
        for snapshot in reachable:
            for cid in self.snapshots[snapshot].manifests:
                users.setdefault(cid, set()).add(snapshot)
        for cid, affected in users.items():
            try:
                manifest = self.repo.objects.manifest(cid)
                sizes = {digest: self.repo.pages.size(digest) for digest in manifest.digests}
            except NotFound:
                self._find(Code.MISSING_MANIFEST, cid, "is not stored", affected, "snapshot the session again")
                continue
            except KvistError as error:
                self._find(Code.DAMAGED_MANIFEST, cid, error, affected, "snapshot the session again")
                continue
            for digest, size in sizes.items():
                self.users.setdefault(digest, set()).update(affected)
                if size is not None and size != manifest.layout.page_bytes:
                    detail = f"has {size} bytes, manifest {cid} says {manifest.layout.page_bytes}"
                    self._find(Code.WRONG_PAGE_SIZE, digest, detail, affected, "snapshot the session again")

    def _segments(self) -> None:
        for key, why in self.repo.pages.broken_segments().items():
            self._find(Code.DAMAGED_SEGMENT, key, why, mend="kvist gc deletes it; puts of its pages write them anew")

    def _pages(self) -> None:
        pages = self.repo.pages
        named = sorted(self.users, key=lambda digest: (pages.homes(digest)[:1], digest))
        self.report.pages = len(named)
        bad = (
            pages.verify(named, self.progress)
            if self.report.read_pages
            else [digest for digest in named if pages.size(digest) is None]
        )
        if bad:
            pages.refresh()  # a gc may have rewritten their segment meanwhile
            if self.report.read_pages:
                bad = pages.verify(bad)
        damaged = {digest for _, digest in pages.damaged_places()}
        mend = "snapshot a session that holds it, or pull it from a copy: the next put heals it"
        for digest in bad:
            if pages.size(digest) is None:
                code = Code.DAMAGED_PAGE if digest in damaged else Code.MISSING_PAGE
                detail = "every copy is damaged" if digest in damaged else "is in no segment"
                self._find(code, digest, detail, self.users[digest], mend)

    def _lock(self) -> None:
        try:
            lock.holder(self.repo.store)
        except Locked as error:
            self._find(Code.DAMAGED_LOCK, lock.KEY, error, mend=error.hint or "")
