"""fsck: checks that whatever a ref reaches is there and whole. Reads everything, changes nothing, not even a mark.

So a store that takes no writes can be checked. What to do about a finding is `kvist.repo.repair`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

from kvist.errors import IntegrityError, InvalidInput, InvalidManifest, Locked, NotFound
from kvist.ids import parse_cid
from kvist.repo import lease, lock, marks, record
from kvist.repo.objects import MANIFESTS, SNAPSHOTS
from kvist.repo.refs import RefKind, UnreadableRef
from kvist.repo.repository import Repository
from kvist.repo.scan import Copy, Cursor, Progress, scan
from kvist.repo.signing import PREFIX as SIGNATURES
from kvist.repo.snapshot import Snapshot
from kvist.store import Store
from kvist.telemetry import counted

_FROM_A_COPY: Final = "kvist repair --from a copy of the repository, or snapshot the session again"
WRONG: Final = (IntegrityError, InvalidInput)
"""What reading an object raises that is not what it should be. A store that is out of reach is another matter."""
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
    DAMAGED_COPY = "damaged_copy"
    WRONG_PAGE_SIZE = "wrong_page_size"
    DAMAGED_SEGMENT = "damaged_segment"
    DAMAGED_LOCK = "damaged_lock"
    DAMAGED_LEASE = "damaged_lease"
    DAMAGED_SIGNATURE = "damaged_signature"
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
        read_pages: whether pages were read and hashed, or only looked up.
        complete: whether every page copy was read: by this check, or by this and those that it goes on from.
        bytes_read: bytes of pages that this check read.
        bytes_done: the same with those before it.
        bytes_all: bytes of all page copies.
        seconds: that reading took.
        damaged: page copies found damaged that are not marked as such.
    """

    findings: list[Finding] = field(default_factory=list)
    snapshots: int = 0
    pages: int = 0
    read_pages: bool = False
    complete: bool = True
    bytes_read: int = 0
    bytes_done: int = 0
    bytes_all: int = 0
    seconds: float = 0.0
    damaged: tuple[Copy, ...] = ()

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
        document = asdict(self)
        del document["damaged"]  # the findings tell of them
        return {"clean": self.is_clean, **document}


@counted("fsck", lambda report: (report.bytes_read, report.pages))
def check(
    repo: Repository,
    *,
    read_pages: bool = True,
    cursor: Cursor | None = None,
    max_duration: float | None = None,
    progress: Progress | None = None,
) -> FsckReport:
    """Check a repository.

    Args:
        repo: what to check; others may write to it meanwhile.
        read_pages: read and hash every page copy, instead of only looking up those that a snapshot names.
        cursor: where to go on reading, from an earlier check that was stopped; `Cursor.load`.
        max_duration: seconds after which no further page is begun; ``None``: read them all.
        progress: called with bytes of pages read and in all.
    """
    report = FsckReport(read_pages=read_pages)
    if read_pages:
        repo.pages.refresh()
        started = time.perf_counter()
        scanned = scan(repo, cursor=cursor, max_duration=max_duration, progress=progress)
        report.seconds = time.perf_counter() - started
        report.damaged, report.complete = scanned.damaged, scanned.is_complete
        report.bytes_read, report.bytes_done, report.bytes_all = (
            scanned.read_bytes,
            scanned.done_bytes,
            scanned.all_bytes,
        )
    for attempt in range(_TRIES):
        before = ref_etags(repo)
        found = _Check(repo, report.damaged).run()
        if found.is_whole or attempt == _TRIES - 1 or ref_etags(repo) == before:
            break
    report.findings, report.snapshots, report.pages = found.findings, found.snapshots, found.pages
    marked = set(repo.pages.damaged_places())
    report.damaged = tuple(copy for copy in report.damaged if (copy.segment, copy.digest) not in marked)
    return report


def ref_etags(repo: Repository) -> list[tuple[str, str]]:
    """Every ref's record and its etag, which changes when the ref does.

    What was reachable when a check began may then rightly be gone by its end, and the other way round.
    """
    return [(info.key, info.etag) for kind in RefKind for info in repo.store.list(kind.value)]


def require_signature(store: Store, key: str) -> None:
    """Whether a signature can be read, and is of the snapshot that its key names; whose it is, the keys' owners know.

    Raises:
        InvalidManifest: it cannot, or is not.
        NotFound: it is gone.
    """
    name, _, key_id = key.removeprefix(SIGNATURES).partition("/")
    document = record.decode(key, store.get(key))
    if (document.get("cid"), document.get("key")) != (f"sha256:{name}", key_id):
        raise InvalidManifest(f"{key}: it is of {document.get('cid')!r:.80}, by {document.get('key')!r:.80}")


class _Check:
    def __init__(self, repo: Repository, damaged: Collection[Copy]) -> None:
        self.repo = repo
        self.report = FsckReport()
        self.copies = {(copy.segment, copy.digest): copy for copy in damaged}
        self.snapshots: dict[str, Snapshot] = {}
        self.tips: set[str] = set()
        self.damaged: set[str] = set()  # cids of snapshots
        self.users: dict[str, set[str]] = {}  # page digest -> snapshots that need it

    def run(self) -> FsckReport:
        self.repo.objects.forget()
        reachable = self._walk(self._tips())
        self._strays()
        self.repo.pages.refresh()  # after the refs were read: what they name was stored before them
        self._manifests(reachable)
        self._segments()
        self._marks()
        self._pages()
        self._lock()
        self._leases()
        self._signatures()
        self.report.snapshots = len(self.snapshots)
        return self.report

    def _find(self, code: Code, subject: str, detail: object, affects: set[str] | None = None, mend: str = "") -> None:
        self.report.findings.append(Finding(code, subject, str(detail), tuple(sorted(affects or ())), mend))

    def _tips(self) -> list[str]:
        tips = []
        for ref in self.repo.refs.look():
            subject = f"{ref.kind.noun} {ref.name}"
            if isinstance(ref, UnreadableRef):
                self._find(Code.DAMAGED_REF, subject, ref.error, {subject}, ref.error.hint or "")
            elif self._load(ref.cid, subject):
                tips.append(ref.cid)
                self.tips.add(ref.cid)
            elif ref.cid not in self.damaged:
                mend = f"kvist {ref.kind.noun} --delete {ref.name}"
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
        except WRONG as error:
            if cid not in self.damaged:
                self.damaged.add(cid)
                mend = "kvist repair --from a copy of the repository, or delete the refs that reach it"
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
                    mend = "kvist repair --from a copy of the repository, or delete the refs that reach it"
                    self._find(Code.MISSING_PARENT, parent, f"is a parent of {cid} and not stored", {cid}, mend)
        return reached

    def _strays(self) -> None:
        """Snapshots that no ref reaches and that are not what their key says, and objects under keys that are no cid.

        They harm nobody. The content of manifests that no ref reaches is not read.
        """
        for prefix in (SNAPSHOTS, MANIFESTS, marks.PRUNED):
            for info in self.repo.store.list(prefix):
                cid = ""
                try:
                    cid = parse_cid("sha256:" + info.key.removeprefix(prefix))
                    if prefix == SNAPSHOTS and cid not in self.snapshots:
                        self.repo.objects.snapshot(cid)
                except NotFound:
                    continue
                except WRONG as error:
                    if cid not in self.damaged:
                        mend = (
                            "no ref reaches it: kvist gc, or kvist repair" if cid else "not one of kvist's: delete it"
                        )
                        self._find(Code.STRAY_OBJECT, info.key, error, mend=mend)

    def _needed(self, users: set[str]) -> set[str]:
        """Those of some snapshots that must be whole: of one that was pruned since, only the record must be there."""
        return users - (marks.pruned(self.repo.store).keys() - self.tips) if users else users

    def _manifests(self, reachable: set[str]) -> None:
        users: dict[str, set[str]] = {}
        for snapshot in self._needed(reachable):
            for cid in self.snapshots[snapshot].manifests:
                users.setdefault(cid, set()).add(snapshot)
        missing: list[str] = []
        for cid, affected in users.items():
            try:
                manifest = self.repo.objects.manifest(cid)
                sizes = {digest: self.repo.pages.size(digest) for digest in manifest.digests}
            except NotFound:
                missing.append(cid)
                continue
            except WRONG as error:
                self._find(Code.DAMAGED_MANIFEST, cid, error, affected, _FROM_A_COPY)
                continue
            for digest, size in sizes.items():
                self.users.setdefault(digest, set()).update(affected)
                if size is not None and size != manifest.layout.page_bytes:
                    detail = f"has {size} bytes, manifest {cid} says {manifest.layout.page_bytes}"
                    self._find(Code.WRONG_PAGE_SIZE, digest, detail, affected, "snapshot the session again")
        needed = self._needed({snapshot for cid in missing for snapshot in users[cid]})
        for cid in missing:
            if affected := users[cid] & needed:
                self._find(Code.MISSING_MANIFEST, cid, "is not stored", affected, _FROM_A_COPY)

    def _segments(self) -> None:
        for key, why in self.repo.pages.broken_segments().items():
            self._find(Code.DAMAGED_SEGMENT, key, why, mend="kvist repair saves what it can, and then kvist gc")

    def _marks(self) -> None:
        """Marks of damage that fit no page."""
        pages = {segment.key: segment.digests for segment in self.repo.pages.segments()}
        for info in self.repo.store.list(marks.DAMAGED):
            mark = marks.parse(info)
            if mark is None or (mark[0] in pages and mark[1] not in pages[mark[0]]):
                self._find(Code.STRAY_OBJECT, info.key, "names no page", mend="not one of kvist's: delete it")

    def _pages(self) -> None:
        pages = self.repo.pages
        self.report.pages = len(self.users)
        places = {
            digest: [key for key in pages.homes(digest) if (key, digest) not in self.copies] for digest in self.users
        }
        lost = {digest for digest, homes in places.items() if not homes}
        still = {segment.key for segment in pages.segments()}
        known = {digest for _, digest in pages.damaged_places()}
        bad = {copy.digest for copy in self.copies.values() if copy.segment in still}
        needed = self._needed({snapshot for digest in lost for snapshot in self.users[digest]})
        for digest in sorted(lost):
            if not (affected := self.users[digest] & needed):
                continue
            if digest in known | bad:
                mend = "kvist repair, then snapshot a session that holds it: the next put heals it; or " + _FROM_A_COPY
                self._find(Code.DAMAGED_PAGE, digest, "every copy is damaged", affected, mend)
            else:
                self._find(Code.MISSING_PAGE, digest, "is in no segment", affected, _FROM_A_COPY)
        for key, digest in sorted(self.copies):
            if key in still and digest not in lost and key in pages.homes(digest):
                detail = f"its copy in {key} is damaged; " + (
                    "another is not" if digest in places else "no ref reaches it"
                )
                self._find(Code.DAMAGED_COPY, digest, detail, mend="kvist repair")

    def _lock(self) -> None:
        try:
            lock.holder(self.repo.store)
        except Locked as error:
            self._find(Code.DAMAGED_LOCK, lock.KEY, error, mend=error.hint or "")

    def _leases(self) -> None:
        for key, why in lease.read(self.repo.store).unreadable:
            self._find(Code.DAMAGED_LEASE, key, why, mend="kvist repair")

    def _signatures(self) -> None:
        for info in self.repo.store.list(SIGNATURES):
            try:
                require_signature(self.repo.store, info.key)
            except NotFound:
                continue
            except WRONG as error:
                self._find(Code.DAMAGED_SIGNATURE, info.key, error, mend="sign the snapshot again: kvist sign")
