"""Refs: names of snapshots. The only mutable objects of a repository.

Knows names, cids and compare-and-swap. Must not know what a snapshot holds.

A branch moves; a tag never does, and a deleted tag's name is never free again, since people cache by tag. A deleted
ref stays as a record without a cid: no store needs a conditional delete.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from kvist.errors import (
    AlreadyExists,
    Conflict,
    DamagedObject,
    IntegrityError,
    InvalidInput,
    InvalidManifest,
    InvalidName,
    NotFound,
    StoreError,
)
from kvist.ids import check_name, parse_cid
from kvist.repo import record
from kvist.repo.manifest import canonical_json
from kvist.store import Match, ObjectInfo, Store
from kvist.store.parallel import in_parallel

_SUFFIX: Final = ".ref"


class RefKind(StrEnum):
    """Where a ref lives in the store."""

    BRANCH = "refs/branches/"
    TAG = "refs/tags/"

    @property
    def noun(self) -> str:
        """``"branch"`` or ``"tag"``."""
        return "branch" if self is RefKind.BRANCH else "tag"


@dataclass(frozen=True, slots=True)
class Ref:
    """A ref as it was read.

    Attributes:
        kind: branch or tag.
        name: its name.
        cid: the snapshot it names.
        etag: of the record, for the next compare-and-swap.
    """

    kind: RefKind
    name: str
    cid: str
    etag: str


@dataclass(frozen=True, slots=True)
class UnreadableRef:
    """A ref that is there and names nobody knows what.

    Attributes:
        kind, name: see `Ref`.
        error: what reading it raises.
    """

    kind: RefKind
    name: str
    error: DamagedObject | InvalidName


@dataclass(frozen=True, slots=True)
class _Record:
    """What lies in a ref's place; the cid is ``None`` where the ref was deleted."""

    cid: str | None
    etag: str


class Refs:
    """The refs of one repository."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def read(self, kind: RefKind, name: str) -> Ref | None:
        """The ref as it is now, or ``None`` if there is none or it was deleted.

        Raises:
            InvalidName: a name that no ref can have.
            DamagedObject: the record is unreadable.
        """
        return _ref(kind, name, self._load(kind, check_name(name)))

    def all(self, kind: RefKind | None = None) -> Iterator[Ref]:
        """All refs (of one kind) that name a snapshot, branches first, by name. Raises as `read`."""
        for found in self.look(kind):
            if isinstance(found, UnreadableRef):
                raise found.error
            yield found

    def look(self, kind: RefKind | None = None) -> Iterator[Ref | UnreadableRef]:
        """As `all`, but what cannot be read is told, not raised. Costs a listing, and a read of each, many at once."""
        for each in RefKind if kind is None else (kind,):
            found = in_parallel(functools.partial(self._listed, each), self._infos(each).items(), self._store)
            yield from filter(None, [*found])

    def names(self, kind: RefKind) -> list[str]:
        """Names with a record of this kind, deleted ones included."""
        return [*self._infos(kind)]

    def modified(self, ref: Ref) -> float:
        """When the record was written, in seconds since the epoch by the store's clock.

        Raises:
            NotFound: it is gone.
        """
        info = self._store.head(_key(ref.kind, ref.name))
        if info is None:
            raise NotFound(f"{ref.kind.noun} {ref.name} has no record any more")
        return info.modified

    def create(self, kind: RefKind, name: str, cid: str) -> Ref:
        """Name a snapshot.

        Raises:
            AlreadyExists: the name is taken; for a tag, also if it ever was.
        """
        found = self._load(kind, check_name(name))
        if found is not None and found.cid is not None:
            raise AlreadyExists(f"{kind.noun} {name} exists and names {found.cid}")
        if found is not None and kind is RefKind.TAG:
            raise AlreadyExists(f"tag {name} was deleted; a tag's name is never used again")
        return Ref(kind, name, cid, self._write(kind, name, cid, found))

    def move(self, ref: Ref, cid: str) -> Ref:
        """Point a branch at another snapshot, if it is still as it was read.

        Raises:
            Conflict: it moved meanwhile.
        """
        assert ref.kind is RefKind.BRANCH, "tags do not move"
        return replace(ref, cid=cid, etag=self._write(ref.kind, ref.name, cid, ref))

    def delete(self, ref: Ref) -> None:
        """Delete a ref, if it is still as it was read; its snapshot stays until a gc finds nothing that reaches it.

        Raises:
            Conflict: it moved meanwhile.
        """
        self._write(ref.kind, ref.name, None, ref)

    def withdraw(self, ref: Ref) -> None:
        """Take back a tag that was made this instant and that nobody can have relied on: its name is free again."""
        key = _key(ref.kind, ref.name)
        info = self._store.head(key)
        if info is not None and info.etag == ref.etag:
            self._store.delete([key])

    def mend(self, kind: RefKind, name: str, cid: str) -> Ref:
        """Replace a record that is unreadable.

        Raises:
            AlreadyExists: it is readable: there is nothing to mend.
            Conflict: it changed meanwhile.
        """
        key = _key(kind, check_name(name))
        info = self._store.head(key)
        try:
            found = self._load(kind, name)
        except DamagedObject:
            mode = Match(info.etag if info is not None else "")
            return Ref(kind, name, cid, self._store.put(key, _encode(key, parse_cid(cid)), mode=mode))
        raise AlreadyExists(f"{kind.noun} {name} is not damaged: it names {found and found.cid}")

    def unmend(self, ref: Ref) -> None:
        """Take back a `mend` of this instant: the record is unreadable again, so that it can be mended.

        Raises:
            Conflict: it moved meanwhile.
        """
        self._store.put(_key(ref.kind, ref.name), b"", mode=Match(ref.etag))

    def _write(self, kind: RefKind, name: str, cid: str | None, found: Ref | _Record | None) -> str:
        """Replace what was found by a record of ``cid``; its etag."""
        key = _key(kind, name)
        data = _encode(key, cid if cid is None else parse_cid(cid))
        try:
            return self._store.put(key, data, mode="create" if found is None else Match(found.etag))
        except (AlreadyExists, Conflict, StoreError) as error:
            written = self._etag_of(key, data)
            if written is None and isinstance(error, StoreError):
                raise
            if written is None:
                now = self._load(kind, name)
                raise Conflict(
                    f"{kind.noun} {name} moved: expected {found and found.cid}, it names {now and now.cid} now",
                    hint="read it again and retry",
                ) from None
            return written

    def _etag_of(self, key: str, data: bytes) -> str | None:
        """The etag of the record, if it holds these bytes, which no other write has made.

        A write may have succeeded and its answer been lost; a store that then tried again by itself met its own.
        """
        with contextlib.suppress(NotFound, IntegrityError, StoreError):
            info = self._store.head(key)
            if info is not None and self._store.get(key) == data:
                return info.etag
        return None

    def _infos(self, kind: RefKind) -> dict[str, ObjectInfo]:
        """Records of this kind by name, ascending."""
        infos = (info for info in self._store.list(kind.value) if info.key.endswith(_SUFFIX))
        return dict(sorted((info.key.removeprefix(kind.value).removesuffix(_SUFFIX), info) for info in infos))

    def _listed(self, kind: RefKind, place: tuple[str, ObjectInfo]) -> Ref | UnreadableRef | None:
        name, info = place
        try:
            return _ref(kind, name, self._record(kind, check_name(name), info))
        except (DamagedObject, InvalidName) as error:
            return UnreadableRef(kind, name, error)

    def _load(self, kind: RefKind, name: str) -> _Record | None:
        info = self._store.head(_key(kind, name))
        return None if info is None else self._record(kind, name, info)

    def _record(self, kind: RefKind, name: str, info: ObjectInfo) -> _Record | None:
        """The record that lies there now; if it is younger than ``info``, a compare-and-swap with it fails."""
        try:
            data = self._store.get(info.key)
            document = record.decode(info.key, data)
            document.pop("nonce", None)
            cid = None if document.get("cid") is None else parse_cid(document["cid"])
            if canonical_json(document) != canonical_json(_document(cid)):  # as text: True is not 1
                raise InvalidManifest(f"expected a version 1 ref, got {document!r:.200}")
        except NotFound:
            return None
        except (IntegrityError, InvalidInput) as error:  # what a store refuses says nothing of the record
            raise DamagedObject(
                f"{kind.noun} {name} is unreadable: {error}", hint=f"point it anew: kvist {kind.noun} --mend {name} CID"
            ) from None
        return _Record(cid, info.etag)


def _ref(kind: RefKind, name: str, found: _Record | None) -> Ref | None:
    return None if found is None or found.cid is None else Ref(kind, name, found.cid, found.etag)


def _key(kind: RefKind, name: str) -> str:
    return f"{kind.value}{name}{_SUFFIX}"


def _encode(key: str, cid: str | None) -> bytes:
    """A record that differs from every other: a store's etag may be no more than the hash of the bytes."""
    return record.encode(key, _document(cid) | {"nonce": secrets.token_hex(8)})


def _document(cid: str | None) -> dict[str, str | int | None]:
    return {"cid": cid, "kind": "kvist-ref", "version": 1}
