"""What a server remembers between requests: whose sequences are whose, what is checked out, and where HEAD is.

Knows the engine, its pager and the repository. Must not know HTTP. Synchronous; the HTTP edge calls it in threads.

HEAD of a sequence is the snapshot that it last was captured to or checked out from. The engine as a whole has several
heads: its last capture, then what was checked out into it since. They are the parents of the next capture, which so
copies only pages that none of them has.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from kvist.errors import InvalidInput, NotFound
from kvist.ids import check_name, short
from kvist.pager.arena import Arena
from kvist.pager.base import CachePager
from kvist.pager.capture import Captured, capture
from kvist.pager.restore import Restored, restore
from kvist.repo import LogicalSeq, Manifest, Repository
from kvist.repo.keeper import Keeper
from kvist.server.heads import Heads
from kvist.server.history import numeric_differences
from kvist.telemetry import operation

if TYPE_CHECKING:
    from kvist.engines.hf import AnyEngine

_OURS: Final = re.compile(r"^(?:[0-9a-f]{12}/)+")


@dataclass(frozen=True, slots=True)
class Session:
    """One sequence of a snapshot, as it is in the engine.

    Attributes:
        cid: the snapshot.
        engine_id: what it is called in the engine.
        sequence: as the snapshot records it.
    """

    cid: str
    engine_id: str
    sequence: LogicalSeq


@dataclass(frozen=True, slots=True)
class CheckedOut:
    """Result of a checkout.

    Attributes:
        cid: the snapshot.
        sessions: what is in the engine now.
        pages: pages of them.
        restored: what had to be done; ``None``: everything was there already.
        tokens: tokens whose KV is reachable.
        differences: what of the numerics is not the same in the snapshot and in the engine; none: the bits agree.
    """

    cid: str
    sessions: tuple[Session, ...]
    pages: int
    restored: Restored | None
    tokens: int
    differences: dict[str, Any]


@dataclass(slots=True)
class Moved:
    """What has gone between an engine and its repository, counted under the names that every live engine uses.

    Attributes:
        loads, loads_failed: checkouts that had pages to bring, and of those the ones that brought none.
        pages_loaded, bytes_loaded: written into the engine. All of them were read from the repository for it.
        load_seconds: what they took.
        pages_captured: copied out of the engine.
        bytes_captured: of them, what the repository did not have.
    """

    loads: int = 0
    loads_failed: int = 0
    pages_loaded: int = 0
    bytes_loaded: int = 0
    load_seconds: float = 0.0
    pages_captured: int = 0
    bytes_captured: int = 0


class Sessions:
    """The engine's sequences and the repository's snapshots, kept in relation. Thread-safe.

    Attributes:
        moved: since it was made.
    """

    def __init__(self, engine: AnyEngine, repo: Repository, pager: Callable[[], CachePager]) -> None:
        """``pager`` makes a pager of ``engine``; each checkout and capture takes a new one."""
        self.engine, self.repo = engine, repo
        self.moved = Moved()
        self._pager = pager
        self._captures, self._checkouts, self._memory = threading.Lock(), threading.Lock(), threading.Lock()
        self._arenas = Arena(), Arena()
        self._heads = Heads(repo)
        self._keeper = Keeper(repo, self, Sessions._held, holder=f"kvist serve, process {os.getpid()}")
        self._engine_heads: dict[str, tuple[str, ...]] = {}  # head to its sequences in the engine; () for a capture

    # -- heads ---------------------------------------------------------------------------------------------------

    def head(self, sequence_id: str) -> str | None:
        """HEAD of a sequence."""
        return self._heads.of(sequence_id)

    def engine_heads(self) -> list[str]:
        """The engine's heads: of what was checked out, only those of which a sequence is still there."""
        present = {info.id for info in self.engine.sequences()}
        with self._memory:
            return [cid for cid, ids in self._engine_heads.items() if not ids or not present.isdisjoint(ids)]

    def set_head(self, sequence_ids: Iterable[str], cid: str) -> None:
        """Say that sequences continue ``cid``."""
        self._heads.set(sequence_ids, cid)
        self._keeper.nudge()

    def close(self) -> None:
        """Let go of what the engine held in the repository. Idempotent; the engine and the repository stay open."""
        self._keeper.close()

    def _held(self) -> list[str]:
        """What a gc must leave: the heads of the engine and of the sequences that are there."""
        heads = [self.head(info.id) for info in self.engine.sequences()]
        return [*self.engine_heads(), *(cid for cid in heads if cid is not None)]

    # -- snapshot ------------------------------------------------------------------------------------------------

    def snapshot(
        self,
        sequence_ids: Collection[str] | None,
        *,
        branch: str,
        name: str | None = None,
        message: str = "",
        parents: Sequence[str] | None = None,
    ) -> Captured:
        """Capture the engine (``None``) or some sequences, and move ``branch`` there.

        Args:
            sequence_ids: which.
            branch: made if need be. Its tip becomes a parent, unless the parents descend from it already: what a
                branch reached once stays reachable.
            name, message: for the record.
            parents: revs to name as parents instead of the heads.

        Raises:
            Conflict: the branch's tip is not among the ancestors of ``parents``, or it moved meanwhile.
            NotFound, InvalidName, StoreFull, …: see `kvist.pager.capture`.
        """
        check_name(branch)
        with self._captures, operation("snapshot", branch=branch) as told:
            cids = self._parents(sequence_ids, branch, parents)
            done = capture(
                self._pager(),
                self.repo,
                sequences=sequence_ids,
                parents=cids,
                name=name,
                message=message,
                branch=branch,
                arena=self._arenas[0],
            )
            told.add(nbytes=done.new_bytes, pages=2 * done.pages_copied)
            self.moved.pages_captured += done.pages_copied
            self.moved.bytes_captured += done.new_bytes
            cid = done.snapshot.cid
            self.set_head([seq.id for seq in self.manifest(cid).sequences], cid)
            if sequence_ids is None:
                with self._memory:
                    self._engine_heads = {cid: ()}
            return done

    def _parents(self, sequence_ids: Collection[str] | None, branch: str, given: Sequence[str] | None) -> list[str]:
        heads = self.engine_heads() if sequence_ids is None else [self.head(name) for name in sequence_ids]
        return self._heads.parents(heads, branch, given)

    # -- checkout ------------------------------------------------------------------------------------------------

    def manifest(self, cid: str) -> Manifest:
        """The manifest of a snapshot for this engine's rank, or else its first."""
        manifests = self.repo.manifests(cid)
        rank = self.engine.layout.tp_rank
        return next((manifest for manifest in manifests if manifest.layout.tp_rank == rank), manifests[0])

    def checkout(self, rev: str, sequence_ids: Collection[str] | None = None) -> CheckedOut:
        """Put a snapshot, or some of its sequences, into the engine; what is there from before is left as it is.

        Raises:
            NotFound: no such snapshot, or no such sequence in it.
            UntrustedSnapshot: there is a policy, and no trusted key signed it.
            LayoutMismatch, DamagedPage, MissingPage, PoolExhausted: see `kvist.pager.restore`.
        """
        cid = self.repo.resolve(rev)
        self.repo.require_trusted(cid)
        manifest = self.manifest(cid)
        self.engine.layout.require(manifest.layout, of=f"snapshot {cid}", into="the engine")
        names = _engine_ids(cid, [seq.id for seq in manifest.sequences])
        wanted = list(names) if sequence_ids is None else sorted(set(sequence_ids))
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise NotFound(f"snapshot {cid} has no sequence {unknown[0]!r}")
        with self._checkouts, operation("checkout", cid=cid) as told:
            # Only a checkout makes such names, so what has the name is the snapshot's own, whatever its head is by now.
            present = {info.id for info in self.engine.sequences()}
            missing = [name for name in wanted if names[name] not in present]
            done = None
            if missing or not wanted:
                whole = sequence_ids is None and missing == wanted
                done = self._restore(cid, None if whole else missing, names)
                halves = 2 * done.pages_loaded
                told.add(nbytes=halves * self.engine.layout.page_bytes, pages=halves)
                self.set_head([names[name] for name in missing], cid)
            with self._memory:
                heads = self._engine_heads
                for gone in [head for head, ids in heads.items() if ids and present.isdisjoint(ids)]:
                    del heads[gone]
                if names:
                    heads.setdefault(cid, tuple(names.values()))
            self._keeper.nudge()
        sessions = [Session(cid, names[seq.id], seq) for seq in manifest.sequences if seq.id in wanted]
        needed = {ix for session in sessions for ix in session.sequence.page_ixs}
        chosen = replace(
            manifest,
            pages=tuple(page for page in manifest.pages if sequence_ids is None or page.ix in needed),
            sequences=tuple(session.sequence for session in sessions),
        )
        differences = numeric_differences(dict(manifest.numerics), self.engine.numerics())
        return CheckedOut(cid, tuple(sessions), len(chosen.pages), done, chosen.tokens, differences)

    def _restore(self, cid: str, sequence_ids: Collection[str] | None, names: Mapping[str, str]) -> Restored:
        """Bring sequences in, by the names that they get in the engine; counted."""
        self.moved.loads += 1
        try:
            done = restore(
                self._pager(),
                self.repo,
                cid,
                sequences=sequence_ids,
                rename=names.__getitem__,
                arena=self._arenas[1],
            )
        except BaseException:
            self.moved.loads_failed += 1
            raise
        self.moved.pages_loaded += done.pages_loaded
        self.moved.bytes_loaded += 2 * done.pages_loaded * self.engine.layout.page_bytes
        self.moved.load_seconds += done.total_s
        return done

    def session(self, rev: str, sequence_id: str | None) -> Session:
        """One sequence of a snapshot, checked out if it is not there yet.

        Raises:
            InvalidInput: the snapshot has several and none was named, or it has none.
            NotFound, …: as `checkout`.
        """
        if sequence_id is None:
            names = [seq.id for seq in self.manifest(self.repo.resolve(rev)).sequences]
            if len(names) != 1:
                choice = ", ".join(map(repr, names[:20]))
                raise InvalidInput(f"{rev} holds {len(names)} sequences, expected the name of one of: {choice}")
            (sequence_id,) = names
        (session,) = self.checkout(rev, [sequence_id]).sessions
        return session


def _engine_ids(cid: str, sequence_ids: Sequence[str]) -> dict[str, str]:
    """What a snapshot's sequences are called in an engine: ``<short cid>/<id>``.

    An id that has such a start already, from an earlier checkout, loses it, unless two would then be called the same.
    """
    bare = {name: _OURS.sub("", name, count=1) for name in sequence_ids}
    taken = list(bare.values())
    return {name: f"{short(cid)}/{base if taken.count(base) == 1 else name}" for name, base in bare.items()}
