"""The repository: snapshots of KV caches in a store, with names, lineage and forks. The facade of `kvist.repo`.

Knows what a commit must make durable, and in which order. Must not know engines.

Order of a commit, each step durable before the next: pages, manifests, snapshot, ref. So whatever a ref reaches is
whole, also after a crash; what a crash leaves behind is unreachable and the next gc's to take. (The one exception, a
writer killed in the moment in which a gc deletes what it names, is told in docs/spec/repository.md.)
"""

from __future__ import annotations

import contextlib
import secrets
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Final, Self

from kvist.errors import (
    AlreadyExists,
    Conflict,
    InvalidInput,
    InvalidManifest,
    NotFound,
    RepositoryNotFound,
)
from kvist.hashing import Buffer
from kvist.ids import ALGORITHMS, check_name, short
from kvist.repo import lineage, lock
from kvist.repo.manifest import Manifest, canonical_json, parse_json
from kvist.repo.objects import Objects, snapshot_key
from kvist.repo.pages import PageStore, PutPages
from kvist.repo.refs import Ref, RefKind, Refs
from kvist.repo.snapshot import Snapshot, check_parts
from kvist.repo.wholeness import Wholeness
from kvist.store import Store, open_store

CONFIG: Final = "kvist.json"
FORKS_MAX: Final = 10_000
"""Most forks in one call."""
_PREFIX_MIN: Final = 6


class Repository:
    """Snapshots, their pages and their names, in one store. Thread-safe.

    Attributes:
        store: where everything lies.
        id: made at `init`; tells repositories apart wherever their store moves.
        page_digest: the algorithm that names pages.
        pages: page halves, see `PageStore`.
        objects: manifests and snapshots, see `Objects`.
        refs: branches and tags, see `Refs`.
    """

    def __init__(self, store: Store, repository_id: str, page_digest: str) -> None:
        self.store: Final = store
        self.id: Final = repository_id
        self.page_digest: Final = page_digest
        self.pages: Final = PageStore(store, page_digest)
        self.objects: Final = Objects(store)
        self.refs: Final = Refs(store)
        self._wholeness: Final = Wholeness(store, self.objects, self.pages)

    # -- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def init(cls, store: Store | str, *, page_digest: str = "blake3") -> Self:
        """Make a repository in an empty place and open it.

        Args:
            store: a store or its url.
            page_digest: ``"blake3"``, or ``"sha256"`` for manifests that the original format's readers accept.

        Raises:
            AlreadyExists: there is one.
        """
        if page_digest not in ALGORITHMS:
            raise InvalidInput(f"page digest must be one of {', '.join(ALGORITHMS)}, got {page_digest!r}")
        store = open_store(store) if isinstance(store, str) else store
        config = {"format": "kvist-repository", "version": 1, "id": uuid.uuid4().hex, "page_digest": page_digest}
        try:
            store.put(CONFIG, canonical_json(config), mode="create")
        except AlreadyExists:
            raise AlreadyExists(f"{store.url} already holds a kvist repository") from None
        return cls.open(store)

    @classmethod
    def open(cls, store: Store | str, *, create: bool = False) -> Self:
        """Open a repository.

        Args:
            store: a store or its url.
            create: make one where there is none.

        Raises:
            RepositoryNotFound: there is none.
            InvalidManifest: a config that this version cannot read.
        """
        store = open_store(store) if isinstance(store, str) else store
        try:
            config = parse_json(store.get(CONFIG), f"{store.url} {CONFIG}")
        except NotFound:
            if create:
                try:
                    return cls.init(store)
                except AlreadyExists:  # another process was first
                    return cls.open(store)
            raise RepositoryNotFound(
                f"{store.url} holds no kvist repository", hint=f"kvist init --store {store.url}"
            ) from None
        if config.get("format") != "kvist-repository" or config.get("version") != 1:
            raise InvalidManifest(
                f"{store.url}: expected a kvist-repository of version 1, "
                f"got {config.get('format')!r:.80} of version {config.get('version')!r:.80}"
            )
        if config.get("page_digest") not in ALGORITHMS or not isinstance(config.get("id"), str):
            raise InvalidManifest(f"{store.url}: {CONFIG} lacks a known page_digest or an id: {config!r:.300}")
        return cls(store, config["id"], config["page_digest"])

    def close(self) -> None:
        """Stop worker threads and close the store. Idempotent."""
        self.pages.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing -------------------------------------------------------------------------------------------------

    def put_pages(self, pages: Sequence[Buffer]) -> PutPages:
        """Store page halves; see `PageStore.put`. What a running gc is about to delete is written anew."""
        condemned = lock.condemned(self.store)
        return self.pages.put(pages, doomed=None if condemned == lock.Condemned() else condemned.loses)

    def commit(
        self,
        manifests: Sequence[Manifest],
        *,
        parents: Sequence[str] | None = None,
        name: str | None = None,
        message: str = "",
        branch: str | None = None,
        replace: bool = False,
    ) -> Snapshot:
        """Record a snapshot of pages that are stored, and move a branch to it.

        Args:
            manifests: one for each group of each tensor-parallel rank, ascending by rank, then by group.
            parents: cids of the snapshots it continues; ``None``: the branch's tip, if it has one and is not replaced.
            name: what its maker calls it.
            message: free text.
            branch: moved to the snapshot by compare-and-swap, or made; ``None``: no ref reaches the snapshot, and a
                gc keeps it only while it is young.
            replace: the branch may move also to what does not descend from its tip: for a cache that is rewritten
                and keeps no history. What only the old tip reached is then garbage for the next gc.

        Raises:
            InvalidInput: no manifests, or not in their order; see `kvist.repo.snapshot.check_parts`.
            MissingPage, DamagedPage: a manifest names a page that is not stored, or only damaged.
            NotFound: an unknown parent, or one that was never finished.
            Conflict: the branch names what is no ancestor of the snapshot (unless ``replace``), or was moved or made
                meanwhile, or a gc took what the snapshot needs; retry.
        """
        check_parts(manifests)
        tip = self.refs.read(RefKind.BRANCH, branch) if branch is not None else None
        if parents is None:
            parents = [tip.cid] if tip is not None and tip.cid is not None and not replace else []
        if not replace and tip is not None and tip.cid not in parents and tip.cid not in self.reachable(parents):
            raise Conflict(
                f"branch {branch} names {tip.cid}, which the new snapshot does not continue; moving it would lose that",
                hint="choose another branch, or give that snapshot as a parent",
            )
        self._wholeness.require_stored(parents)
        for parent in parents:
            self._wholeness.require_whole(self.objects.snapshot(parent))
        self._wholeness.require_pages(manifests)
        snapshot = Snapshot(
            manifests=tuple(manifest.cid for manifest in manifests),
            parents=tuple(parents),
            tokens=max((manifest.tokens for manifest in manifests), default=0),
            name=name,
            message=message,
            created_ns=time.time_ns(),
        )
        self.objects.put_manifests(manifests)
        self.objects.put_snapshots([snapshot])
        if branch is None:
            self._wholeness.confirm([snapshot])
        else:
            try:
                self._publish_all([(RefKind.BRANCH, branch, snapshot, tip)])
            except AlreadyExists as error:
                raise Conflict(f"{error}; there was no such branch before", hint="read it again and retry") from None
        self._wholeness.learn(snapshot)
        return snapshot

    def fork(self, rev: str, n: int, *, name: str | None = None) -> list[Snapshot]:
        """Make ``n`` snapshots that continue ``rev``, each with its own branch. No page is read or copied.

        Args:
            rev: what to fork; see `resolve`.
            n: how many, 1 to `FORKS_MAX`.
            name: branches are called ``name/0``, ``name/1``, …; default ``fork/<short cid>-<random>/0``, ….

        Returns:
            The snapshots, in the order of their branches. Their cids differ; their manifests are those of ``rev``.

        Raises:
            AlreadyExists: a branch of such a name exists; no fork was made.
        """
        if type(n) is not int or not 1 <= n <= FORKS_MAX:
            raise InvalidInput(f"the number of forks must be in [1, {FORKS_MAX}], got {n!r}")
        cid = self.resolve(rev)
        source = self.objects.snapshot(cid)
        base = check_name(name) if name is not None else f"fork/{short(cid)}-{secrets.token_hex(4)}"
        self._wholeness.require_pages(map(self.objects.manifest, source.manifests))
        for taken in set(self.refs.names(RefKind.BRANCH)) & {f"{base}/{i}" for i in range(n)}:
            if self.refs.read(RefKind.BRANCH, taken) is not None:  # a deleted branch leaves its name free
                raise AlreadyExists(f"branch {taken} exists", hint="choose another name")
        forks = [
            Snapshot(
                source.manifests,
                (cid,),
                source.tokens,
                f"{base}/{i}",
                created_ns=time.time_ns(),
                nonce=secrets.token_hex(8),
            )
            for i in range(n)
        ]
        self.objects.put_snapshots(forks)
        self._publish_all([(RefKind.BRANCH, f"{base}/{i}", fork, None) for i, fork in enumerate(forks)])
        return forks

    def branch(self, name: str, rev: str, *, move: bool = False) -> Ref:
        """Make a branch at ``rev``; with ``move``, point an existing one there.

        Raises:
            AlreadyExists: it exists, and ``move`` is false.
            Conflict: it moved meanwhile, or a gc is deleting the snapshot.
        """
        found = self.refs.read(RefKind.BRANCH, name)
        if found is not None and not move:
            raise AlreadyExists(f"branch {name} exists and names {found.cid}", hint=f"kvist branch --move {name} {rev}")
        return self._name(RefKind.BRANCH, name, rev, found)

    def tag(self, name: str, rev: str) -> Ref:
        """Tag a snapshot, for ever.

        Raises:
            AlreadyExists: the tag exists, or existed once.
        """
        return self._name(RefKind.TAG, name, rev, None)

    def delete_ref(self, kind: RefKind, name: str) -> Ref:
        """Delete a branch or tag and return what it was.

        Raises:
            NotFound: there is none of that name.
            Conflict: it moved meanwhile.
        """
        found = self.refs.read(kind, name)
        if found is None:
            raise NotFound(f"there is no {kind.noun} {name}")
        self.refs.delete(found)
        return found

    def mend_ref(self, kind: RefKind, name: str, rev: str) -> Ref:
        """Point a branch or tag whose record is unreadable at a snapshot.

        Raises:
            AlreadyExists: it is readable: there is nothing to mend.
            Conflict: it changed meanwhile, or a gc is deleting the snapshot.
        """
        snapshot = self._to_name(rev)
        ref = self.refs.mend(kind, name, snapshot.cid)
        try:
            self._wholeness.confirm([snapshot])
        except BaseException:
            with contextlib.suppress(Conflict):
                self.refs.unmend(ref)
            raise
        return ref

    def _name(self, kind: RefKind, name: str, rev: str, found: Ref | None) -> Ref:
        return self._publish_all([(kind, name, self._to_name(rev), found)])[0]

    def _to_name(self, rev: str) -> Snapshot:
        """A snapshot that may be named, as far as can be seen before it is."""
        snapshot = self.objects.snapshot(self.resolve(rev))
        self._wholeness.require_pages(map(self.objects.manifest, snapshot.manifests))
        return snapshot

    def _publish_all(self, wanted: Sequence[tuple[RefKind, str, Snapshot, Ref | None]]) -> list[Ref]:
        """Name stored snapshots, each by a ref that was read before, under the protocol of `kvist.repo.lock`.

        Raises:
            AlreadyExists, Conflict: nothing is named.
        """
        snapshots = [snapshot for _, _, snapshot, _ in wanted]
        if lock.holder(self.store) is not None:
            self._wholeness.confirm(snapshots)
        published: list[tuple[Ref, Ref | None]] = []
        try:
            for kind, name, snapshot, found in wanted:
                cid = snapshot.cid
                ref = self.refs.create(kind, name, cid) if found is None else self.refs.move(found, cid)
                published.append((ref, found))
            self._wholeness.confirm(snapshots)
        except BaseException:
            for ref, found in published:
                with contextlib.suppress(Conflict):  # somebody moved the ref on meanwhile: it is theirs now
                    self._take_back(ref, found)
            raise
        return [ref for ref, _ in published]

    def _take_back(self, ref: Ref, found: Ref | None) -> None:
        if found is not None and found.cid is not None:
            self.refs.move(ref, found.cid)
        elif ref.kind is RefKind.TAG:
            self.refs.withdraw(ref)
        else:
            self.refs.delete(ref)

    # -- reading -------------------------------------------------------------------------------------------------

    def get_pages(self, digests: Sequence[str], outs: Sequence[memoryview]) -> None:
        """Read page halves into ready buffers, verified; see `PageStore.get_into`."""
        self.pages.get_into(digests, outs)

    def manifest(self, cid: str) -> Manifest:
        """The manifest of that cid; see `Objects.manifest`."""
        return self.objects.manifest(cid)

    def snapshot(self, rev: str) -> Snapshot:
        """The snapshot that ``rev`` names; see `resolve`."""
        return self.objects.snapshot(self.resolve(rev))

    def resolve(self, rev: str) -> str:
        """The cid that ``rev`` names: a cid, a branch, a tag, or the unique first digits (6 or more) of a cid.

        Raises:
            NotFound: nothing is called so.
            InvalidInput: several things are.
        """
        digits = rev.removeprefix("sha256:")
        is_hex = bool(digits) and all(c in "0123456789abcdef" for c in digits)
        if is_hex and len(digits) == 64:
            cid = f"sha256:{digits}"
            if not self.objects.has(snapshot_key(cid)):
                raise NotFound(f"there is no snapshot {cid}")
            return cid
        found: dict[str, str] = {}
        if digits == rev:
            refs = [self.refs.read(kind, rev) for kind in RefKind]
            found = {f"{ref.kind.noun} {rev}": ref.cid for ref in refs if ref is not None and ref.cid is not None}
        if not found and is_hex and len(digits) >= _PREFIX_MIN:
            found = {cid: cid for cid, _ in self.objects.snapshots() if cid.startswith(f"sha256:{digits}")}
        if not found:
            raise NotFound(f"no snapshot, branch or tag is called {rev!r}", hint="kvist log")
        if len(set(found.values())) > 1:
            raise InvalidInput(f"{rev!r} is ambiguous: {', '.join(f'{k} ({v})' for k, v in sorted(found.items()))}")
        return next(iter(found.values()))

    def reachable(self, tips: Iterable[str] | None = None) -> dict[str, Snapshot]:
        """Snapshots that ``tips`` (default: all refs) descend from, themselves included.

        Raises:
            NotFound: a tip or an ancestor is not stored.
        """
        if tips is None:
            tips = [ref.cid for ref in self.refs.all() if ref.cid is not None]
        return {
            cid: self.objects.snapshot(cid)
            for cid in lineage.ancestors(tips, lambda c: self.objects.snapshot(c).parents)
        }

    def log(self, rev: str | None = None) -> list[Snapshot]:
        """Snapshots that ``rev`` (default: all refs) reaches, children before parents, newest first."""
        snapshots = self.reachable(None if rev is None else [self.resolve(rev)])
        return [snapshots[cid] for cid in lineage.newest_first(snapshots)]
