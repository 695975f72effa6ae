"""Naming: gives stored snapshots their names, so that no gc that runs meanwhile takes what they need.

Knows refs, and the protocol of `kvist.repo.lock`: look, name, look again, and take the names back if something is gone.
Must not know how a snapshot came to be stored.

A snapshot that no ref has reached all the while may be what a gc that was cut short has left, without its ancestors: a
store deletes in whatever order it likes. So before it is named, all of these are looked for.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Sequence
from typing import Final

from kvist.errors import AlreadyExists, Conflict, InvalidInput, NotFound
from kvist.ids import check_name, short
from kvist.repo import lock
from kvist.repo.objects import Objects, snapshot_key
from kvist.repo.refs import Ref, RefKind, Refs
from kvist.repo.revision import find
from kvist.repo.snapshot import Snapshot
from kvist.repo.wholeness import Wholeness
from kvist.store import Store

FORKS_MAX: Final = 10_000
"""Most forks in one call."""
Wanted = tuple[RefKind, str, Snapshot, Ref | None]
"""Kind and name of a ref, what it shall name, and the ref as it was read; ``None``: there was none."""


class Naming:
    """What a `Repository` does with the names of snapshots; its methods of these names tell the rest. Thread-safe."""

    def __init__(self, store: Store, objects: Objects, refs: Refs, wholeness: Wholeness) -> None:
        self._store, self._objects, self._refs, self._wholeness = store, objects, refs, wholeness

    def branch(self, name: str, rev: str, *, move: bool) -> Ref:
        """See `Repository.branch`."""
        found = self._refs.read(RefKind.BRANCH, name)
        if found is not None and not move:
            raise AlreadyExists(f"branch {name} exists and names {found.cid}", hint=f"kvist branch --move {name} {rev}")
        return self._name(RefKind.BRANCH, name, rev, found)

    def tag(self, name: str, rev: str) -> Ref:
        """See `Repository.tag`."""
        return self._name(RefKind.TAG, name, rev, None)

    def fork(self, rev: str, n: int, *, name: str | None) -> list[Snapshot]:
        """See `Repository.fork`."""
        if type(n) is not int or not 1 <= n <= FORKS_MAX:
            raise InvalidInput(f"the number of forks must be in [1, {FORKS_MAX}], got {n!r}")
        source, via = self._to_name(rev)
        base = check_name(name) if name is not None else f"fork/{short(source.cid)}-{secrets.token_hex(4)}"
        for taken in set(self._refs.names(RefKind.BRANCH)) & {f"{base}/{i}" for i in range(n)}:
            if self._refs.read(RefKind.BRANCH, taken) is not None:  # a deleted branch leaves its name free
                raise AlreadyExists(f"branch {taken} exists", hint="choose another name")
        forks = [
            Snapshot(
                source.manifests,
                (source.cid,),
                source.tokens,
                f"{base}/{i}",
                created_ns=time.time_ns(),
                nonce=secrets.token_hex(8),
            )
            for i in range(n)
        ]
        self._objects.put_snapshots(forks)
        self.publish([(RefKind.BRANCH, f"{base}/{i}", fork, None) for i, fork in enumerate(forks)], via=via)
        return forks

    def delete(self, kind: RefKind, name: str) -> Ref:
        """See `Repository.delete_ref`."""
        found = self._refs.read(kind, name)
        if found is None:
            raise NotFound(f"there is no {kind.noun} {name}")
        self._refs.delete(found)
        return found

    def mend(self, kind: RefKind, name: str, rev: str) -> Ref:
        """See `Repository.mend_ref`."""
        snapshot, via = self._to_name(rev)
        self._wholeness.require_past([snapshot], {ref.cid for ref in via})
        ref = self._refs.mend(kind, name, snapshot.cid)
        try:
            self._wholeness.confirm([snapshot])
            self._wholeness.require_past([snapshot], self._still_named(via))
        except BaseException:
            with contextlib.suppress(Conflict):
                self._refs.unmend(ref)
            raise
        return ref

    def publish(
        self,
        wanted: Sequence[Wanted],
        *,
        keys: Collection[str] = (),
        digests: Collection[str] = (),
        via: Collection[Ref] = (),
    ) -> list[Ref]:
        """See `Repository.publish`; ``via``: refs as they were read, which reach what is named or what it continues."""
        others = [snapshot for _, _, snapshot, _ in wanted if snapshot_key(snapshot.cid) not in keys]
        moved = {found.cid for *_, found in wanted if found is not None}  # named until the very moment of the move

        def confirm() -> None:
            self._wholeness.confirm(others)
            self._wholeness.confirm_stored(keys, digests)

        self._wholeness.require_past(others, moved | {ref.cid for ref in via})
        if lock.holder(self._store) is not None:
            confirm()
        published: list[tuple[Ref, Ref | None]] = []
        try:
            for kind, name, snapshot, found in wanted:
                cid = snapshot.cid
                ref = self._refs.create(kind, name, cid) if found is None else self._refs.move(found, cid)
                published.append((ref, found))
            confirm()
            self._wholeness.require_past(others, moved | self._still_named(via))
        except BaseException:
            for ref, found in reversed(published):  # where that fails too, those made first are left
                with contextlib.suppress(Conflict):  # somebody moved the ref on meanwhile: it is theirs now
                    self._take_back(ref, found)
            raise
        return [ref for ref, _ in published]

    def _name(self, kind: RefKind, name: str, rev: str, found: Ref | None) -> Ref:
        snapshot, via = self._to_name(rev)
        return self.publish([(kind, name, snapshot, found)], via=via)[0]

    def _to_name(self, rev: str) -> tuple[Snapshot, list[Ref]]:
        """A snapshot that may be named, as far as can be seen before it is, and the refs that are called ``rev``."""
        cid, via = find(self._objects, self._refs, rev)
        snapshot = self._objects.snapshot(cid)
        self._wholeness.require_pages(self._wholeness.manifests(snapshot))
        return snapshot, via

    def _still_named(self, via: Collection[Ref]) -> set[str]:
        return {ref.cid for ref in via if self._refs.read(ref.kind, ref.name) == ref}

    def _take_back(self, ref: Ref, found: Ref | None) -> None:
        if found is not None:
            self._refs.move(ref, found.cid)
        elif ref.kind is RefKind.TAG:
            self._refs.withdraw(ref)
        else:
            self._refs.delete(ref)
