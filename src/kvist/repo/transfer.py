"""Transfer: what a repository lacks of another's snapshots, and moving it there. Plans, then applies.

Knows refs and the order of things. What the target lacks is found by `kvist.repo.lacking`, and moved by
`kvist.repo.moving`. Push and pull are the same act with the sides changed. It goes on where it was when it is run
again: whatever arrived is not sent twice.

Order of an apply, each step durable before the next: manifests, pages, snapshots (parents first), signatures, refs. A
lease keeps a gc at the target from what has arrived and has no name yet; that manifests come first lets a gc see which
of the pages that lay there already are wanted again. Whatever a ref reaches is whole at every moment.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from kvist.errors import (
    AccessDenied,
    AlreadyExists,
    Conflict,
    InvalidInput,
    NotFound,
    PageNameMismatch,
    StoreError,
)
from kvist.ids import check_name, short
from kvist.repo import lease, moving
from kvist.repo.holdings import Holdings, descends
from kvist.repo.lacking import Lacking, survey
from kvist.repo.refs import Ref, RefKind
from kvist.repo.repository import Repository
from kvist.store import ReadOnlyStore, Store
from kvist.store.parallel import in_parallel
from kvist.telemetry import counted

_TTL: Final = 3600.0
"""Seconds that a lease outlives a transfer that died; a batch over a slow line may take a good part of that."""

logger = logging.getLogger(__name__)


class Act(StrEnum):
    """What becomes of a ref at the target. Values never change meaning."""

    CREATE = "create"
    FORWARD = "fast-forward"
    REPLACE = "replace"
    MEND = "mend"
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class RefMove:
    """One ref at the target.

    Attributes:
        kind, name: which.
        cid: the snapshot wanted.
        act: what becomes of it. ``KEEP``: it names that snapshot already, or one that descends from it.
        found: the ref as it was read at the target, or ``None``.
    """

    kind: RefKind
    name: str
    cid: str
    act: Act
    found: Ref | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        before = self.found.cid if self.found is not None else None
        return {"kind": self.kind.noun, "name": self.name, "cid": self.cid, "act": str(self.act), "before": before}


@dataclass(frozen=True)
class TransferPlan:
    """What a transfer would move.

    Attributes:
        source, target: urls of the stores.
        moves: what becomes of the target's refs, in the order asked for.
        lacking: what the target lacks.
    """

    source: str
    target: str
    moves: tuple[RefMove, ...]
    lacking: Lacking

    @property
    def is_empty(self) -> bool:
        """Whether the target has it all, under the right names."""
        return self.lacking.is_empty and all(move.act is Act.KEEP for move in self.moves)

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        refs = [move.to_json() for move in self.moves]
        return {"source": self.source, "target": self.target, "refs": refs} | self.lacking.to_json()

    def summary(self) -> str:
        """For people."""
        what = self.lacking
        return (
            f"{len(what.snapshots):,} snapshots, {len(what.manifests):,} manifests, {len(what.pages):,} page halves "
            f"({what.page_bytes:,} bytes)" + (f", {len(what.signatures):,} signatures" if what.signatures else "")
        )


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a transfer did.

    Attributes:
        pages: page halves that the target did not have before.
        page_bytes: bytes of those.
        refs: as they are at the target now, of those that moved.
    """

    pages: int
    page_bytes: int
    refs: tuple[Ref, ...]

    def to_json(self) -> dict[str, Any]:
        """As a JSON-serialisable mapping."""
        return {"moved_pages": self.pages, "moved_page_bytes": self.page_bytes, "moved_refs": len(self.refs)}


def init_like(source: Repository, store: Store) -> Repository:
    """Make, in an empty place, a repository that names pages as ``source`` does.

    Raises:
        AlreadyExists: there is one.
    """
    return Repository.init(store, page_digest=source.page_digest, salt=source.config.salt)


# -- planning ----------------------------------------------------------------------------------------------------


def plan(
    source: Repository,
    target: Repository,
    revs: Sequence[str] = (),
    *,
    everything: bool = False,
    force: bool = False,
    heal: bool = False,
) -> TransferPlan:
    """Find what the target lacks of some refs and all that they reach. Changes nothing but marks on damaged pages.

    Args:
        source: where it comes from.
        target: where it goes.
        revs: branches and tags of the source; or ``REV:NAME``, to bring whatever REV names to the branch NAME.
        everything: all branches and tags, instead.
        force: let branches of the target move also to what does not descend from their tips.
        heal: trust nothing that the target holds: read each of its objects and pages that is reached, and send anew
            what is missing or damaged; replace refs that cannot be read. Pages known to be damaged are sent anew
            without this too.

    Raises:
        InvalidInput: nothing asked for, a rev without a name, two revs for one name, or both sides are one repository.
        NotFound: the source has no such rev, or lacks what it reaches.
        PageNameMismatch: the sides name pages differently.
        Conflict: a branch of the target has moved elsewhere (unless ``force``).
        AlreadyExists: a tag of the target names something else, or was deleted.
        DamagedPage, MissingPage, DamagedObject, InvalidManifest: the source cannot give what the target lacks; or a
            ref of the target cannot be read (unless ``heal``).
    """
    _require_two_alike(source, target)
    if bool(revs) == everything:
        raise InvalidInput("say which branches and tags to transfer, or that it is all of them")
    source.pages.refresh()
    holdings = Holdings(target, heals=heal)
    wanted = _all_refs(source) if everything else _named_refs(source, revs)
    moves = tuple(_move(source, target, holdings, kind, name, cid, force=force) for (kind, name), cid in wanted.items())
    lacking = survey(source, target, holdings, frozenset(move.cid for move in moves), ahead=everything)
    return TransferPlan(source.store.url, target.store.url, moves, lacking)


def _require_two_alike(source: Repository, target: Repository) -> None:
    if source.store == target.store:
        raise InvalidInput(f"source and target are one repository: {source.store.url}")
    if source.page_identity != target.page_identity:
        raise PageNameMismatch(
            f"{source.store.url} names pages by {source.page_identity}, {target.store.url} by {target.page_identity}: "
            "the same page has another name there",
            hint="kvist clone makes a repository that names pages as its source does",
        )


def _all_refs(source: Repository) -> dict[tuple[RefKind, str], str]:
    names = [(kind, name) for kind in RefKind for name in source.refs.names(kind)]
    refs = in_parallel(lambda key: source.refs.read(*key), names, source.store)
    return {key: ref.cid for key, ref in zip(names, refs, strict=True) if ref is not None and ref.cid is not None}


def _named_refs(source: Repository, revs: Sequence[str]) -> dict[tuple[RefKind, str], str]:
    """The refs at the target that ``revs`` ask for, and the snapshot for each."""
    wanted: dict[tuple[RefKind, str], str] = {}
    for rev in revs:
        for kind, name, cid in _named(source, rev):
            if wanted.setdefault((kind, name), cid) != cid:
                raise InvalidInput(f"two snapshots are to go to {kind.noun} {name}: {wanted[kind, name]} and {cid}")
    return wanted


def _named(source: Repository, text: str) -> list[tuple[RefKind, str, str]]:
    """What ``REV`` or ``REV:NAME`` asks for."""
    head = "sha256:" if text.startswith("sha256:") else ""
    rev, _, name = text.removeprefix(head).partition(":")
    cid = source.resolve(head + rev) if name or head else None
    if cid is not None and name:
        return [(RefKind.BRANCH, check_name(name), cid)]
    refs = [source.refs.read(kind, rev) for kind in RefKind] if not head else []
    found = [(ref.kind, ref.name, ref.cid) for ref in refs if ref is not None and ref.cid is not None]
    if not found:
        cid = source.resolve(head + rev)
        raise InvalidInput(
            f"{text!r:.120} is no branch or tag of {source.store.url}, so nothing would hold it at the target",
            hint=f"give it a branch there: {short(cid)}:NAME",
        )
    return found


def _move(
    source: Repository,
    target: Repository,
    holdings: Holdings,
    kind: RefKind,
    name: str,
    cid: str,
    *,
    force: bool,
) -> RefMove:
    unreadable = holdings.unreadable.get((kind, name))
    if unreadable is not None:
        if not holdings.heals:
            raise unreadable
        return RefMove(kind, name, cid, Act.MEND)
    found = holdings.refs.get((kind, name))
    if found is None or found.cid is None:
        if kind is RefKind.TAG and (kind, name) in holdings.names:
            raise AlreadyExists(f"tag {name} was deleted at {target.store.url}; a tag's name is never used again")
        return RefMove(kind, name, cid, Act.CREATE)
    if found.cid == cid:
        return RefMove(kind, name, cid, Act.KEEP, found)
    if kind is RefKind.TAG:
        raise AlreadyExists(
            f"tag {name} names {found.cid} at {target.store.url}, and {cid} at {source.store.url}; a tag never moves"
        )
    if descends(source, cid, found.cid):
        return RefMove(kind, name, cid, Act.FORWARD, found)
    if force:
        return RefMove(kind, name, cid, Act.REPLACE, found)
    if descends(target, found.cid, cid):
        return RefMove(kind, name, cid, Act.KEEP, found)
    raise Conflict(
        f"branch {name} names {found.cid} at {target.store.url}, which {cid} at {source.store.url} does not continue",
        hint="transfer it to another name, as REV:NAME, or use --force, which loses what only the branch there reaches",
    )


# -- applying ----------------------------------------------------------------------------------------------------


@counted("transfer", lambda moved: (moved.page_bytes, moved.pages))
def apply(
    source: Repository,
    target: Repository,
    planned: TransferPlan,
    *,
    batch_bytes: int = moving.BATCH_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Transferred:
    """Move what was planned, and name it. Others may write to both sides meanwhile, and a gc may run on either.

    Args:
        source, target: those that were planned for.
        planned: from `plan`.
        batch_bytes: of pages that become durable together; twice as much memory is used.
        progress: called with bytes of pages moved, and bytes of pages to move.

    Raises:
        Conflict: a ref moved meanwhile, or a gc took what was relied upon; no ref was moved. Plan anew.
        IntegrityError: a page or object of the source is missing or damaged, or arrived as something else; no ref was
            moved, and what has arrived serves the next try.
        StoreFull: likewise.
    """
    if planned.is_empty:
        return Transferred(0, 0, ())
    lacking = planned.lacking
    with contextlib.ExitStack() as stack:
        leases = _hold_source(stack, source, planned)
        there = {move.cid for move in planned.moves if move.act is not Act.KEEP and not lacking.concerns(move.cid)}
        leases.append(stack.enter_context(lease.hold(target, cids=lacking.held | there, since=True, ttl=_TTL)))

        def renew() -> None:
            for held in leases:
                held.renew()

        moving.move_manifests(source, target, lacking.manifests, renew)
        moved = moving.move_pages(source, target, lacking.needed_pages, batch_bytes, renew, progress)
        moving.move_snapshots(source, target, lacking.snapshots, lacking.pruned, renew)
        moving.move_signatures(source, target, lacking.signatures, renew)
        return Transferred(moved.new_pages, moved.new_bytes, tuple(_name(target, planned)))


def _hold_source(stack: contextlib.ExitStack, source: Repository, planned: TransferPlan) -> list[lease.Lease]:
    """Keep a gc from what is being read: by a lease, if the source takes one."""
    cids = {move.cid for move in planned.moves if planned.lacking.concerns(move.cid)}
    try:
        return [stack.enter_context(lease.hold(source, cids=cids, ttl=_TTL))]
    except (StoreError, AccessDenied) as error:
        level = logging.INFO if isinstance(source.store, ReadOnlyStore) else logging.WARNING
        logger.log(level, "reading %s without a lease, so a gc there may hinder it: %s", planned.source, error)
        return []


def _name(target: Repository, planned: TransferPlan) -> list[Ref]:
    needed = planned.lacking
    moves = [move for move in planned.moves if move.act not in (Act.KEEP, Act.MEND)]
    try:
        wanted = [(move.kind, move.name, target.objects.snapshot(move.cid), move.found) for move in moves]
        named = target.publish(wanted, keys=needed.needed_keys, digests=needed.needed_pages) if wanted else []
    except AlreadyExists as error:
        raise Conflict(f"{error}; there was none when this was planned", hint="plan the transfer anew") from None
    except NotFound as error:
        raise Conflict(f"{error}: a gc took it; no ref was moved", hint="plan the transfer anew") from None
    return named + [target.mend_ref(move.kind, move.name, move.cid) for move in planned.moves if move.act is Act.MEND]
