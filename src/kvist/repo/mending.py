"""Mending: does what a repair has planned, each step durable before the next kind.

Knows how each act is done, and that a repair that was killed is simply run again: every step looks whether it still is
needed, none takes anything away that is not, by then, of no use to anybody. Must not know what should be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kvist.errors import Conflict, Locked, NotFound
from kvist.repo import fsck, lease, lock, marks, segment
from kvist.repo.batch import windows
from kvist.repo.fsck import WRONG
from kvist.repo.reach import Reach, stored
from kvist.repo.refs import RefKind
from kvist.repo.repair import Act, RepairPlan, Step
from kvist.repo.repository import Repository
from kvist.repo.scan import Progress
from kvist.repo.signing import PREFIX as SIGNATURES
from kvist.store.quota import making_room
from kvist.telemetry import counted

_BATCH: Final = 64 << 20
"""Bytes of pages brought at a time; each batch is durable before the next."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """Result of a repair.

    Attributes:
        done: steps that were done.
        failed: steps that could not be, each with the reason.
        left: what a quick check still finds. Damage that only reading tells of was marked, and so is among it.
    """

    done: tuple[Step, ...]
    failed: tuple[tuple[Step, str], ...]
    left: tuple[fsck.Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return {
            "done": [step.to_json() for step in self.done],
            "failed": [step.to_json() | {"reason": reason} for step, reason in self.failed],
            "left": [asdict(finding) for finding in self.left],
        }


@counted("repair")
def apply(
    repo: Repository, planned: RepairPlan, *, source: Repository | None = None, progress: Progress | None = None
) -> Repaired:
    """Do what was planned. Others may use the repository meanwhile; a gc refuses as long as anything is missing.

    Args:
        repo: what was planned for.
        planned: from `kvist.repo.repair.plan`.
        source: where the plan's pages and objects are fetched from.
        progress: called with bytes of pages brought and to bring.

    Raises:
        StoreError: the store refused. What was done so far stays; run again.
    """
    mender = _Mender(repo, source, progress, planned.steps)
    mender.unlock()
    with making_room(), lease.hold(repo, since=True, holder="kvist repair") as held:
        mender.run(held)
    repo.objects.forget()
    left = fsck.check(repo, read_pages=False).findings
    return Repaired(tuple(mender.done), tuple(mender.failed), tuple(left))


class _Mender:
    def __init__(
        self, repo: Repository, source: Repository | None, progress: Progress | None, steps: Sequence[Step]
    ) -> None:
        self.repo, self.source, self.progress = repo, source, progress
        self.steps = {act: [step for step in steps if step.act is act] for act in Act}
        self.done: list[Step] = []
        self.failed: list[tuple[Step, str]] = []

    def unlock(self) -> None:
        """Delete a gc lock that is unreadable: nothing can be written while it lies there."""
        self._each(Act.BREAK_LOCK, self._delete)

    def run(self, held: lease.Lease) -> None:
        """All else, under a lease on what it writes."""
        self._each(Act.MARK, lambda step: marks.record(self.repo.store, _mark(step)))
        self._each(Act.UNMARK, lambda step: marks.withdraw(self.repo.store, [_mark(step)]))
        self.repo.pages.refresh()
        for _ in self._bring([*self.steps[Act.SAVE], *self.steps[Act.FETCH_PAGE]]):
            held.renew()
        self.steps[Act.FETCH_OBJECT].sort(key=lambda step: step.subject)  # manifests come before snapshots
        self._each(Act.FETCH_OBJECT, self._fetch)
        self.repo.objects.forget()
        self._each(Act.REWIND, self._rewind)
        self._each(Act.DELETE, self._delete)

    def _each(self, act: Act, do: Callable[[Step], None]) -> None:
        for step in self.steps[act]:
            try:
                do(step)
            except (Conflict, NotFound, *WRONG) as error:
                self.failed.append((step, str(error)))
            else:
                self.done.append(step)

    # -- pages ---------------------------------------------------------------------------------------------------

    def _bring(self, steps: Sequence[Step]) -> Iterator[None]:
        """Store pages again, in batches; a page that cannot be read after all keeps no other from it."""
        brought, size = 0, sum(step.size for step in steps)
        for batch in windows(steps, [step.size for step in steps], _BATCH):
            pages = []
            for step in batch:
                try:
                    pages.append(self._read(step))
                except (NotFound, *WRONG) as error:
                    self.failed.append((step, str(error)))
                else:
                    self.done.append(step)
            self.repo.put_pages(pages)
            brought += sum(step.size for step in batch)
            if self.progress is not None:
                self.progress(brought, size)
            yield

    def _read(self, step: Step) -> bytes:
        if step.place is not None:
            return step.place.read(self.repo)
        return self._source().pages.get(step.subject)

    # -- objects -------------------------------------------------------------------------------------------------

    def _source(self) -> Repository:
        if self.source is None:
            raise NotFound("the plan fetches from another repository, and none was given", hint="give --from again")
        return self.source

    def _fetch(self, step: Step) -> None:
        cid = "sha256:" + step.subject.rpartition("/")[2]
        data = stored(self._source(), step.subject, cid)
        if data is None:
            raise NotFound(f"{self._source().store.url} has no whole {step.subject} any more")
        if stored(self.repo, step.subject, cid) is None:
            self.repo.store.put(step.subject, data)

    def _rewind(self, step: Step) -> None:
        found = self.repo.refs.read(RefKind.BRANCH, step.subject)
        if found is None or found.cid != step.expected:
            raise Conflict(f"branch {step.subject} has moved since; it names {found and found.cid}")
        self.repo.branch(step.subject, step.where, move=True)

    def _delete(self, step: Step) -> None:
        """Delete what is still as bad as it was; a segment only if nobody can miss what it may hold."""
        if step.subject.startswith(segment.PREFIX):
            if any(failed.act is Act.SAVE for failed, _ in self.failed):
                raise Conflict("not every page that it holds could be saved", hint="run it again")
            if not fsck.check(self.repo, read_pages=False).is_whole:
                raise Conflict("something that a ref reaches is missing; this segment may hold it")
            leased = Reach(self.repo)
            leased.follow(lease.read(self.repo.store).cids)
            if leased.lost or leased.pages:
                raise Conflict("something that a lease holds is missing; this segment may hold it")
        if self._is_bad(step.subject):
            self.repo.store.delete([step.subject])
            self.repo.pages.refresh()

    def _is_bad(self, key: str) -> bool:
        store, info = self.repo.store, self.repo.store.head(key)
        if info is None:
            return False
        try:
            if key == lock.KEY:
                lock.holder(store)
            elif key.startswith(segment.PREFIX):
                segment.read_index(store, key, info.size, info.modified, self.repo.page_digest)
            elif key.startswith(lease.PREFIX):
                lease.LeaseRecord.decode(key, info.etag, store.get(key))
            elif key.startswith(SIGNATURES):
                fsck.require_signature(store, key)
            else:
                return stored(self.repo, key, "sha256:" + key.rpartition("/")[2]) is None
        except (Locked, *WRONG):
            return True
        except NotFound:
            return False
        return False


def _mark(step: Step) -> marks.Mark:
    return step.where, bytes.fromhex(step.subject.partition(":")[2])
