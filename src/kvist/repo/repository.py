"""The repository: snapshots of KV caches in a store, with names, lineage and forks. The facade of `kvist.repo`.

Knows what a commit must make durable, and in which order. Must not know engines.

Order of a commit, each step durable before the next: pages, manifests, snapshot, ref. So whatever a ref reaches is
whole, also after a crash; what a crash leaves behind is unreachable and the next gc's to take. (The one exception, a
writer killed in the moment in which a gc deletes what it names, is told in docs/spec/repository.md.)
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final, Self

from kvist.errors import AlreadyExists, Conflict, NotFound, RepositoryNotFound
from kvist.hashing import Buffer
from kvist.repo import lineage, lock, marks
from kvist.repo.config import CONFIG, CONFIG_MAX, RepositoryConfig
from kvist.repo.manifest import Manifest
from kvist.repo.naming import Naming, Wanted
from kvist.repo.objects import SNAPSHOTS, Objects
from kvist.repo.pages import PageStore, PutPages
from kvist.repo.refs import Ref, RefKind, Refs
from kvist.repo.revision import find
from kvist.repo.segment import PREFIX as SEGMENTS
from kvist.repo.signing import Trust
from kvist.repo.snapshot import Snapshot, check_parts
from kvist.repo.tier import PageTier, open_tier
from kvist.repo.wholeness import Wholeness
from kvist.store import Match, Quota, QuotaStore, Store, open_store
from kvist.telemetry import counted, operation

_CONTENT: Final = (*RefKind, SNAPSHOTS, SEGMENTS)
"""Prefixes of what only a repository has."""


class Repository:
    """Snapshots, their pages and their names, in one store. Thread-safe.

    Attributes:
        store: where everything lies.
        config: its id, which tells repositories apart wherever their store moves, and how it names pages.
        trust: who must have signed a snapshot before it is checked out; ``None``: nobody.
        pages: page halves, see `PageStore`.
        objects: manifests and snapshots, see `Objects`.
        refs: branches and tags, see `Refs`.
    """

    def __init__(
        self,
        store: Store,
        config: RepositoryConfig,
        *,
        trust: Trust | None = None,
        tiers: Sequence[PageTier] = (),
    ) -> None:
        self.store: Final = QuotaStore(store, config.quota) if config.quota else store
        self.config: Final = config
        self.trust: Final = trust
        self.pages: Final = PageStore(self.store, config.page_digest, digest=config.digest, tiers=tiers)
        self.objects: Final = Objects(self.store)
        self.refs: Final = Refs(self.store)
        self._wholeness: Final = Wholeness(self.store, self.objects, self.pages)
        self._naming: Final = Naming(self.store, self.objects, self.refs, self._wholeness)

    @property
    def id(self) -> str:
        """Made at `init`."""
        return self.config.id

    @property
    def page_digest(self) -> str:
        """The algorithm that names pages."""
        return self.config.page_digest

    @property
    def page_identity(self) -> str:
        """Equal in repositories that name equal pages alike; between others nothing can be copied as it is."""
        return self.config.page_identity

    # -- opening -------------------------------------------------------------------------------------------------

    @classmethod
    def init(
        cls, store: Store | str, *, page_digest: str = "blake3", salt: str = "", quota: Quota | None = None
    ) -> Self:
        """Make a repository in an empty place and open it.

        Args:
            store: a store or its url.
            page_digest: ``"blake3"``, or ``"sha256"`` for manifests that the original format's readers accept.
            salt: 32 random bytes in hex, so that neither digests nor block hashes tell what others have too; for a
                copy of a repository, its own.
            quota: what it may hold.

        Raises:
            AlreadyExists: there is one.
            RepositoryNotFound: there was one, and only its config is gone.
        """
        config = RepositoryConfig(uuid.uuid4().hex, page_digest, salt, quota or Quota())
        store = open_store(store) if isinstance(store, str) else store
        _make(store, config)
        return cls.open(store)

    @classmethod
    def open(
        cls,
        store: Store | str,
        *,
        create: bool = False,
        trust: Trust | None = None,
        tiers: Sequence[PageTier | str] = (),
    ) -> Self:
        """Open a repository.

        Args:
            store: a store or its url.
            create: make one where there is none, and nothing of one.
            trust: see the class.
            tiers: nearer copies of pages, or their urls, the first asked first; closed with the repository.

        Raises:
            RepositoryNotFound: there is none, or its config is gone.
            InvalidManifest: a config that this version cannot read.
        """
        store = open_store(store) if isinstance(store, str) else store
        try:
            data = store.get(CONFIG, size=CONFIG_MAX + 1)
        except NotFound:
            if not create:
                raise RepositoryNotFound(
                    f"{store.url} holds no kvist repository", hint=f"kvist init --store {store.url}"
                ) from None
            with contextlib.suppress(AlreadyExists):  # another process was first
                _make(store, RepositoryConfig(uuid.uuid4().hex))
            return cls.open(store, trust=trust, tiers=tiers)
        config = RepositoryConfig.decode(data, store.url)
        opened = [open_tier(tier) if isinstance(tier, str) else tier for tier in tiers]
        return cls(store, config, trust=trust, tiers=opened)

    def set_quota(self, quota: Quota) -> None:
        """Say what it may hold. It counts for whoever opens it from now on.

        Raises:
            Conflict: somebody else set it meanwhile.
        """
        info = self.store.head(CONFIG)
        if info is None:
            raise RepositoryNotFound(f"{self.store.url} holds its repository no more")
        config = RepositoryConfig.decode(self.store.get(CONFIG, size=CONFIG_MAX + 1), self.store.url)
        self.store.put(CONFIG, replace(config, quota=quota).encode(), mode=Match(info.etag))

    def require_trusted(self, cid: str) -> None:
        """Refuse to check a snapshot out that no trusted key signed, if there is such a policy.

        Raises:
            UntrustedSnapshot: it has no such signature.
        """
        if self.trust is not None:
            self.trust.require(self.store, cid)

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
        with operation("put_pages") as done:
            condemned = lock.condemned(self.store)
            put = self.pages.put(pages, doomed=None if condemned == lock.Condemned() else condemned.loses)
            done.add(nbytes=put.new_bytes, pages=put.new_pages)
            return put

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
            parents = [tip.cid] if tip is not None and not replace else []
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
                self.publish([(RefKind.BRANCH, branch, snapshot, tip)])
            except AlreadyExists as error:
                raise Conflict(f"{error}; there was no such branch before", hint="read it again and retry") from None
        self._wholeness.learn(snapshot)
        return snapshot

    @counted("fork")
    def fork(self, rev: str, n: int, *, name: str | None = None) -> list[Snapshot]:
        """Make ``n`` snapshots that continue ``rev``, each with its own branch. No page is read or copied.

        Args:
            rev: what to fork; see `resolve`.
            n: how many, 1 to 10,000.
            name: branches are called ``name/0``, ``name/1``, …; default ``fork/<short cid>-<random>/0``, ….

        Returns:
            The snapshots, in the order of their branches. Their cids differ; their manifests are those of ``rev``.

        Raises:
            AlreadyExists: a branch of such a name exists; no fork was made.
            NotFound, Conflict: see `branch`.
        """
        return self._naming.fork(rev, n, name=name)

    def branch(self, name: str, rev: str, *, move: bool = False) -> Ref:
        """Make a branch at ``rev``; with ``move``, point an existing one there.

        Raises:
            AlreadyExists: it exists, and ``move`` is false.
            NotFound: there is no such snapshot, or not all that it descends from.
            Conflict: it moved meanwhile, or a gc is deleting the snapshot.
        """
        return self._naming.branch(name, rev, move=move)

    def tag(self, name: str, rev: str) -> Ref:
        """Tag a snapshot, for ever.

        Raises:
            AlreadyExists: the tag exists, or existed once.
            NotFound, Conflict: see `branch`.
        """
        return self._naming.tag(name, rev)

    def delete_ref(self, kind: RefKind, name: str) -> Ref:
        """Delete a branch or tag and return what it was.

        Raises:
            NotFound: there is none of that name.
            Conflict: it moved meanwhile.
        """
        return self._naming.delete(kind, name)

    def mend_ref(self, kind: RefKind, name: str, rev: str) -> Ref:
        """Point a branch or tag whose record is unreadable at a snapshot.

        Raises:
            AlreadyExists: it is readable: there is nothing to mend.
            NotFound, Conflict: see `branch`.
        """
        return self._naming.mend(kind, name, rev)

    def publish(
        self,
        wanted: Sequence[Wanted],
        *,
        keys: Collection[str] = (),
        digests: Collection[str] = (),
    ) -> list[Ref]:
        """Name stored snapshots, each by a ref that was read before, under the protocol of `kvist.repo.lock`.

        What `commit`, `branch` and the like do in the end; for whoever stores several snapshots and names the last.

        Args:
            wanted: kind, name, snapshot, and the ref as it was read; ``None``: there was none.
            keys: of snapshots and manifests that must be there and stay; a named snapshot that is not among them is
                looked at by itself, with all that it needs.
            digests: of pages that must.

        Raises:
            AlreadyExists, Conflict: nothing is named.
            NotFound: likewise; a named snapshot that is looked at by itself has lost an ancestor.
        """
        return self._naming.publish(wanted, keys=keys, digests=digests)

    # -- reading -------------------------------------------------------------------------------------------------

    def get_pages(self, digests: Sequence[str], outs: Sequence[memoryview]) -> None:
        """Read page halves into ready buffers, verified; see `PageStore.get_into`."""
        with operation("get_pages") as done:
            self.pages.get_into(digests, outs)
            done.add(nbytes=sum(map(len, outs)), pages=len(outs))

    def manifest(self, cid: str) -> Manifest:
        """The manifest of that cid; see `Objects.manifest`."""
        return self.objects.manifest(cid)

    def manifests(self, rev: str) -> list[Manifest]:
        """The manifests of the snapshot that ``rev`` names, in its order.

        Raises:
            NotFound: nothing is called so.
            PrunedSnapshot: its record is kept, what it named is not.
        """
        return self._wholeness.manifests(self.snapshot(rev))

    def pruned(self) -> set[str]:
        """Cids of the snapshots that were pruned; what a ref names is not, as long as it does."""
        return marks.pruned(self.store).keys() - {ref.cid for ref in self.refs.all()}

    def snapshot(self, rev: str) -> Snapshot:
        """The snapshot that ``rev`` names; see `resolve`."""
        return self.objects.snapshot(self.resolve(rev))

    def resolve(self, rev: str) -> str:
        """The cid that ``rev`` names: a cid, a branch, a tag, or the unique first digits (6 or more) of a cid.

        Raises:
            NotFound: nothing is called so.
            InvalidInput: several things are.
        """
        return find(self.objects, self.refs, rev)[0]

    def reachable(self, tips: Iterable[str] | None = None) -> dict[str, Snapshot]:
        """Snapshots that ``tips`` (default: all refs) descend from, themselves included.

        Raises:
            NotFound: a tip or an ancestor is not stored.
        """
        if tips is None:
            tips = [ref.cid for ref in self.refs.all()]
        return {
            cid: self.objects.snapshot(cid)
            for cid in lineage.ancestors(tips, lambda c: self.objects.snapshot(c).parents)
        }

    def log(self, rev: str | None = None) -> list[Snapshot]:
        """Snapshots that ``rev`` (default: all refs) reaches, children before parents, newest first."""
        snapshots = self.reachable(None if rev is None else [self.resolve(rev)])
        return [snapshots[cid] for cid in lineage.newest_first(snapshots)]


def _make(store: Store, config: RepositoryConfig) -> None:
    if any(next(iter(store.list(prefix)), None) for prefix in _CONTENT) and store.head(CONFIG) is None:
        raise RepositoryNotFound(
            f"{store.url} holds a repository whose {CONFIG} is gone; a new one would name its pages in another way",
            hint=f"put {CONFIG} back from a copy",
        )
    try:
        store.put(CONFIG, config.encode(), mode="create")
    except AlreadyExists:
        raise AlreadyExists(f"{store.url} already holds a kvist repository") from None
