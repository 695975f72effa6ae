"""Refs: names of snapshots. The only mutable objects of a repository.

Knows names, cids and compare-and-swap. Must not know what a snapshot holds.

A branch moves; a tag never does, and a deleted tag's name is never free again, since people cache by tag. A deleted
ref stays as a record without a cid: no store needs a conditional delete.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kvist.errors import AlreadyExists, Conflict, DamagedObject, InvalidManifest, KvistError, NotFound
from kvist.ids import check_name, parse_cid
from kvist.repo.manifest import canonical_json, parse_json
from kvist.store import Match, Store

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
        cid: the snapshot it names; ``None`` where the ref was deleted.
        etag: of the record, for the next compare-and-swap.
    """

    kind: RefKind
    name: str
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
        ref = self._load(kind, check_name(name))
        return ref if ref is not None and ref.cid is not None else None

    def all(self, kind: RefKind | None = None) -> Iterator[Ref]:
        """All refs (of one kind) that name a snapshot, branches first, by name. Raises as `read`."""
        for each in RefKind if kind is None else (kind,):
            for name in self.names(each):
                ref = self.read(each, name)
                if ref is not None:
                    yield ref

    def names(self, kind: RefKind) -> list[str]:
        """Names with a record of this kind, deleted ones included."""
        found = (info.key for info in self._store.list(kind.value))
        return sorted(key.removeprefix(kind.value).removesuffix(_SUFFIX) for key in found if key.endswith(_SUFFIX))

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
        return self._write(kind, name, cid, found)

    def move(self, ref: Ref, cid: str) -> Ref:
        """Point a branch at another snapshot, if it is still as it was read.

        Raises:
            Conflict: it moved meanwhile.
        """
        assert ref.kind is RefKind.BRANCH, "tags do not move"
        return self._write(ref.kind, ref.name, cid, ref)

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
            return Ref(kind, name, cid, self._store.put(key, _encode(parse_cid(cid)), mode=mode))
        raise AlreadyExists(f"{kind.noun} {name} is not damaged: it names {found and found.cid}")

    def unmend(self, ref: Ref) -> None:
        """Take back a `mend` of this instant: the record is unreadable again, so that it can be mended.

        Raises:
            Conflict: it moved meanwhile.
        """
        self._store.put(_key(ref.kind, ref.name), b"", mode=Match(ref.etag))

    def _write(self, kind: RefKind, name: str, cid: str | None, found: Ref | None) -> Ref:
        data = _encode(cid if cid is None else parse_cid(cid))
        try:
            etag = self._store.put(_key(kind, name), data, mode="create" if found is None else Match(found.etag))
        except (Conflict, AlreadyExists):
            now = self._load(kind, name)
            raise Conflict(
                f"{kind.noun} {name} moved: expected {found and found.cid}, it names {now and now.cid} now",
                hint="read it again and retry",
            ) from None
        return Ref(kind, name, cid, etag)

    def _load(self, kind: RefKind, name: str) -> Ref | None:
        key = _key(kind, name)
        info = self._store.head(key)
        if info is None:
            return None
        try:
            data = self._store.get(key)
            document = parse_json(data, key)
            cid = None if document.get("cid") is None else parse_cid(document["cid"])
            if data != _encode(cid):
                raise InvalidManifest(f"expected a version 1 ref, got {document!r:.200}")
        except NotFound:
            return None
        except KvistError as error:
            raise DamagedObject(
                f"{kind.noun} {name} is unreadable: {error}", hint=f"point it anew: kvist {kind.noun} --mend {name} CID"
            ) from None
        return Ref(kind, name, cid, info.etag)


def _key(kind: RefKind, name: str) -> str:
    return f"{kind.value}{name}{_SUFFIX}"


def _encode(cid: str | None) -> bytes:
    return canonical_json({"cid": cid, "kind": "kvist-ref", "version": 1})
