"""A store in an OCI image layout: a directory that skopeo, oras and registries' tools copy. Knows nothing of KV.

    <root>/oci-layout, <root>/index.json   which artifacts there are, by tag
    <root>/blobs/sha256/<64 hex>           everything else: objects, and the manifest that lists them
    <root>/.tmp/, <root>/.lock             unfinished writes; held while an artifact changes

The store is one tag's artifact. A change writes a new manifest and swaps ``index.json``, so that a copy made at any
moment is of one state. Meant for handing a repository on, not for many writers: each change costs a manifest.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from kvist.errors import AlreadyExists, Conflict, IntegrityError, InvalidInput, NotFound, StoreError
from kvist.hashing import Buffer
from kvist.store import artifact
from kvist.store.artifact import Layer, Tree
from kvist.store.base import Match, ObjectInfo, ObjectWriter, PutMode, Range, Store, check_key, check_prefix
from kvist.store.posix import (
    Temporary,
    etag_of,
    exclusive,
    fill_ranges,
    make_directories,
    read_upto,
    readable,
    remove_stale,
    sync_directories,
    translated,
    write_all,
)
from kvist.store.staging import StagedWriter, StagingPool

_TRIES: Final = 100
"""How often a reader begins again because a writer was there; each time it is a new state that it missed."""
_OTHERS_KEPT: Final = 100


class OciStore(Store):
    """The objects of one artifact, safe for threads and processes of one machine. Made by the first write."""

    def __init__(self, root: Path, tag: str = "latest", *, durable: bool = True) -> None:
        """Open, without touching it, the artifact ``tag`` of the image layout at ``root``.

        Raises:
            InvalidInput: a tag that a registry would not take.
        """
        if not artifact.TAG.fullmatch(tag):
            raise InvalidInput(f"an OCI tag has at most 128 letters, digits and '._-', got {tag!r:.160}")
        self._root, self._tag, self._durable = root.resolve(), tag, durable
        self._blobs = self._root / "blobs" / "sha256"
        self._temporaries = self._root / ".tmp"
        self._pool = StagingPool()
        self._seen: tuple[str, Tree] = "", {}
        self._others: dict[str, frozenset[str]] = {}  # blobs that other manifests name, by manifest
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """``oci:/absolute/path:tag``."""
        return f"oci:{self._root}:{self._tag}"

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, key: str, *, start: int = 0, size: int | None = None) -> bytes:
        """See `Store.get`."""
        with self._reading(key) as fd:
            left = max(os.fstat(fd).st_size - start, 0)
            return read_upto(fd, start, left if size is None else min(size, left))

    def get_ranges(self, key: str, ranges: Sequence[Range]) -> None:
        """See `Store.get_ranges`."""
        with self._reading(key) as fd:
            fill_ranges(fd, ranges, key)

    def head(self, key: str) -> ObjectInfo | None:
        """See `Store.head`."""
        layer = self._tree().get(check_key(key))
        return None if layer is None else layer.info(key)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `Store.list`."""
        check_prefix(prefix)
        tree = self._tree()
        return iter([tree[key].info(key) for key in sorted(tree) if key.startswith(prefix)])

    @contextmanager
    def _reading(self, key: str) -> Iterator[int]:
        """The object's open blob."""
        fd, layer = -1, self._tree().get(check_key(key))
        for _ in range(_TRIES):
            if layer is None:
                raise NotFound(f"{self.url} has no object {key}")
            path = self._blobs / layer.blob
            try:
                with readable(path):
                    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                break
            except StoreError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
            before, layer = layer, self._tree().get(key)
            if layer == before:
                raise IntegrityError(f"{self.url}: the blob {before.blob} of {key} is missing")
        try:
            with readable(self._blobs):
                yield fd
        finally:
            if fd >= 0:
                os.close(fd)

    def _tree(self) -> Tree:
        """The artifact as it is now; read anew if ``index.json`` changed."""
        path = self._root / "index.json"
        for _ in range(_TRIES):
            with readable(path):
                try:
                    etag = etag_of(path.stat())
                except (FileNotFoundError, NotADirectoryError):
                    return {}
                with self._lock:
                    if self._seen[0] == etag:
                        return self._seen[1]
                try:
                    tree = self._read_tree()
                except FileNotFoundError:  # the manifest went with the index that named it
                    if etag_of(path.stat()) == etag:
                        raise IntegrityError(f"{self.url}: the manifest that index.json names is missing") from None
                    continue
                if etag_of(path.stat()) == etag:
                    with self._lock:
                        self._seen = etag, tree
                    return tree
        raise Conflict(f"{self.url} changes faster than it can be read", hint="retry")

    def _read_tree(self) -> Tree:
        blob = artifact.find(self._index(), self._tag)
        return {} if blob is None else artifact.decode_manifest(self._read_json(blob), self.url)

    def _index(self) -> dict[str, Any]:
        try:
            data = (self._root / "index.json").read_bytes()
        except FileNotFoundError:
            return {}
        return artifact.parse(data, f"{self._root}/index.json")

    def _read_json(self, blob: str) -> bytes:
        data = (self._blobs / blob).read_bytes()
        if artifact.hex_of(data) != blob:
            raise IntegrityError(f"{self._blobs / blob} does not hold what its name says")
        return data

    # -- writing -------------------------------------------------------------------------------------------------

    def put(self, key: str, data: Buffer, *, mode: PutMode = "overwrite") -> str:
        """See `Store.put`."""
        check_key(key)
        blob = _hex(data)
        with translated("write to", self._root):
            file = self._write(data)
            try:
                with self._changing() as tree:
                    found = tree.get(key)
                    if mode == "create" and found is not None:
                        raise AlreadyExists(f"{self.url} already has {key}")
                    if isinstance(mode, Match) and (found is None or found.etag != mode.etag):
                        raise Conflict(f"{key} changed: expected etag {mode.etag}, found {found and found.etag}")
                    tree[key] = self._add(file, blob)
                    return tree[key].etag
            finally:
                file.discard()

    def put_many(self, items: Sequence[tuple[str, Buffer]], *, mode: Literal["overwrite", "create"]) -> None:
        """See `Store.put_many`. One manifest for all."""
        for key, _ in items:
            check_key(key)
        if not items:
            return
        with translated("write to", self._root), self._changing() as tree:
            for key, data in items:
                if mode == "create" and key in tree:
                    continue
                file = self._write(data)
                try:
                    tree[key] = self._add(file, _hex(data))
                finally:
                    file.discard()

    def writer(self, key: str) -> ObjectWriter:
        """See `Store.writer`."""
        check_key(key)
        content = hashlib.sha256()

        def publish(file: Temporary) -> None:
            with translated("write to", self._root):
                file.seal(durable=self._durable)
                with self._changing() as tree:
                    if key in tree:
                        raise AlreadyExists(f"{self.url} already has {key}")
                    tree[key] = self._add(file, content.hexdigest())

        with translated("create a file in", self._temporaries):
            return _HashingWriter(StagedWriter(key, self._temporary, self._pool, publish), content)

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`."""
        wanted = [check_key(key) for key in keys]
        if self._tree().keys().isdisjoint(wanted):
            return
        with translated("delete from", self._root), self._changing() as tree:
            for key in wanted:
                tree.pop(key, None)

    def clean(self, older_than: float) -> int:
        """See `Store.clean`. Blobs that no artifact of the layout names are leftovers."""
        with translated("clean", self._root):
            freed = remove_stale(self._temporaries, older_than)
            if not self._blobs.is_dir():
                return freed
            with exclusive(self._root / ".lock"):
                limit = time.time() - older_than
                named = self._named(self._tree())
                for path in self._blobs.iterdir():
                    stat = path.stat()
                    if named is not None and path.name not in named and stat.st_mtime <= limit:
                        path.unlink()
                        freed += stat.st_size
            return freed

    def close(self) -> None:
        """Free the staging buffers. The store can be used on."""
        self._pool.clear()

    def _temporary(self, flags: int = 0) -> Temporary:
        return Temporary(self._temporaries, flags, durable=self._durable)

    def _write(self, data: Buffer) -> Temporary:
        """A sealed file with ``data``."""
        file = self._temporary()
        try:
            write_all(file.fd, data)
            file.seal(durable=self._durable)
        except BaseException:
            file.discard()
            raise
        return file

    def _add(self, file: Temporary, blob: str) -> Layer:
        """Make a sealed file a blob. One of that name is replaced: it may be damaged."""
        size = os.fstat(file.fd).st_size
        file.path.rename(self._blobs / blob)
        return Layer.new(blob, size)

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Layer]]:
        """The artifact, to be changed by nobody else; what became of it is durable, then visible, at the end."""
        make_directories(self._blobs, durable=self._durable)
        with exclusive(self._root / ".lock"):
            before = self._tree()
            tree = dict(before)
            yield tree
            if tree != before:
                self._publish(tree, before)

    def _publish(self, tree: Tree, before: Tree) -> None:
        index = self._index()
        manifest = artifact.encode_manifest(tree)
        old, new = artifact.find(index, self._tag), artifact.hex_of(manifest)
        for data, path in (
            (artifact.LAYOUT, self._root / "oci-layout"),
            (artifact.EMPTY, self._blobs / artifact.hex_of(artifact.EMPTY)),
        ):
            if not path.exists():
                self._place(data, path)
        self._place(manifest, self._blobs / new)
        if self._durable:
            sync_directories([self._blobs])
        self._place(artifact.encode_index(index, self._tag, new, len(manifest)), self._root / "index.json")
        if self._durable:
            sync_directories([self._root])
        with self._lock:
            self._seen = etag_of((self._root / "index.json").stat()), tree
        gone = {layer.blob for layer in before.values()} - {layer.blob for layer in tree.values()}
        self._drop(gone if old is None else gone | {old}, tree)

    def _place(self, data: bytes, path: Path) -> None:
        file = self._write(data)
        try:
            file.path.rename(path)
        finally:
            file.discard()

    def _drop(self, blobs: set[str], tree: Tree) -> None:
        """Delete those that no artifact of the layout names any more."""
        named = self._named(tree)
        for blob in blobs - named if named is not None else ():
            (self._blobs / blob).unlink(missing_ok=True)

    def _named(self, tree: Tree) -> set[str] | None:
        """Every blob that the layout's artifacts name, ours being ``tree``; ``None`` if that cannot be told."""
        index = self._index()
        ours = artifact.find(index, self._tag)
        named = {artifact.hex_of(artifact.EMPTY), *(layer.blob for layer in tree.values()), *artifact.blobs_in(index)}
        try:
            for blob in artifact.blobs_in(index):
                named |= self._named_by(blob) if blob != ours else frozenset()
        except (IntegrityError, FileNotFoundError):
            return None
        return named

    def _named_by(self, blob: str) -> frozenset[str]:
        """Blobs that a manifest names, or an index and those below it."""
        if blob not in self._others:
            if len(self._others) >= _OTHERS_KEPT:
                self._others.clear()
            document = artifact.parse(self._read_json(blob), blob)
            below = [self._named_by(one) for one in artifact.blobs_in(document.get("manifests"))]
            self._others[blob] = frozenset(artifact.blobs_in(document)).union(*below)
        return self._others[blob]


class _HashingWriter(ObjectWriter):
    """Tells ``content`` of every byte."""

    def __init__(self, writer: ObjectWriter, content: Any) -> None:
        self._writer, self._content = writer, content

    def write(self, data: Buffer) -> None:
        self._writer.write(data)
        self._content.update(data)

    def commit(self) -> None:
        self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()


def _hex(data: Buffer) -> str:
    return hashlib.sha256(data).hexdigest()
