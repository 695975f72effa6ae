"""Snapshots of a vLLM engine: captured, committed, checked out. Puts an engine core and a repository together.

Knows both, and the answers' fields. Must not know HTTP.

The engine core's workers bring pages and manifests into the store and take pages out of it; this process reads
manifests, checks them against the engine, and commits. What it remembers (heads) is its own: with several API servers,
each has its own heads, and the branch's tip, which becomes a parent, connects them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread

from kvist.errors import (
    Conflict,
    EngineError,
    InvalidInput,
    InvalidManifest,
    KvistError,
    LayoutMismatch,
    MissingPage,
    NotFound,
    StoreError,
)
from kvist.ids import check_name
from kvist.repo import LogicalSeq, Manifest, Repository, Snapshot
from kvist.repo.repository import CONFIG
from kvist.server.errors import BadRequest
from kvist.server.heads import Heads
from kvist.server.history import History, parts_of_rank, sequence_record
from kvist.server.schema import BODY_MAX, SnapshotBody, VllmCheckoutBody
from kvist.server.vllm.client import Captured, Core, Description, EngineClient

log = logging.getLogger("kvist.server")

_T = TypeVar("_T")
_HEADS_MAX: Final = 64
_COMMITS: Final = 5
"""Times to commit, where others move the branch meanwhile."""
_CHOICE: Final = re.compile(r"^\d+_|-\d+$")


@dataclass(frozen=True, slots=True)
class Parts:
    """A snapshot with its manifests, as they fit an engine.

    Attributes:
        cid: the snapshot's.
        manifests: ascending by rank, then by group.
        groups: those of the first rank. The other ranks' differ in the pages' digests only.
    """

    cid: str
    manifests: tuple[Manifest, ...]
    groups: tuple[Manifest, ...]

    def sequence(self, sequence_id: str) -> LogicalSeq:
        """A sequence of it, by the first group, or raise `NotFound`."""
        found = self.groups[0].sequence(sequence_id)
        if found is None:
            raise NotFound(f"snapshot {self.cid} has no sequence {sequence_id!r:.200}")
        return found

    def chosen(self, sequence_ids: Collection[str] | None) -> Parts:
        """Only these sequences and their pages."""
        if sequence_ids is None:
            return self
        for name in sequence_ids:
            self.sequence(name)
        return Parts(
            self.cid,
            tuple(_chosen(manifest, sequence_ids) for manifest in self.manifests),
            tuple(_chosen(manifest, sequence_ids) for manifest in self.groups),
        )


class _Opened:
    """An engine core and the repository that it writes to, once both are reached."""

    def __init__(self, core: Core, repo: Repository) -> None:
        self.core, self.repo, self.heads = core, repo, Heads(repo)


class Snapshots:
    """One vLLM engine's snapshots. Lives in the event loop of the API server; what blocks runs in threads."""

    def __init__(self) -> None:
        self._core: Core | None = None
        self._opened: _Opened | None = None
        self._opening, self._commits = asyncio.Lock(), asyncio.Lock()
        self._checking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._engine_heads: OrderedDict[str, None] = OrderedDict()
        self._limiter = CapacityLimiter(8)
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- reaching engine and repository --------------------------------------------------------------------------

    def attach(self, engine: EngineClient | None) -> None:
        """Say which engine it is; ``None``: this server has none. Reaches nothing yet."""
        if engine is not None and (self._core is None or self._core.engine is not engine):
            self._core, self._opened = Core(engine), None

    async def open(self) -> tuple[Core, Repository, Heads]:
        """Engine and repository, opened on first use, and tried again on the next if it fails.

        Raises:
            NoConnector: the engine has no connector of ours.
            StoreError: the store cannot be reached, or holds no repository that can be read.
        """
        if self._core is None:
            raise EngineError("this server has no engine, or is still starting")
        async with self._opening:
            if self._opened is None:
                core = self._core
                url = core.store
                repo = await to_thread.run_sync(_open, url, limiter=self._limiter)
                self._opened = _Opened(core, repo)
        return self._opened.core, self._opened.repo, self._opened.heads

    async def history(self, body_max: int = BODY_MAX) -> History:
        """The routes that need the repository only."""
        _, repo, _ = await self.open()
        return History(repo, self._run, lambda: list(self._engine_heads), body_max)

    async def stats(self) -> dict[str, int]:
        """What the first rank's worker has done since it started."""
        core, _, _ = await self.open()
        return await core.stats()

    async def _run(self, work: Callable[[], _T]) -> _T:
        """``work`` in a thread. A store that is lost looks empty: what then is not found is told as that."""
        try:
            return await to_thread.run_sync(work, limiter=self._limiter)
        except (NotFound, MissingPage) as error:
            store = self._opened.repo.store if self._opened is not None else None
            if store is not None and await to_thread.run_sync(store.head, CONFIG, limiter=self._limiter) is None:
                raise StoreError(f"{store.url} holds its repository no more: is the disk mounted?") from error
            raise

    async def _to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of ``work``, which goes on to its end also if the client goes away, or the request is cancelled.

        Half a snapshot or checkout would have to be undone; a whole one is there for the client that asks again.
        """
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the request's answer tells of it; without one, nobody would have asked

    # -- snapshot ------------------------------------------------------------------------------------------------

    async def snapshot(self, body: SnapshotBody) -> dict[str, Any]:
        """Capture a request or everything, commit, and answer.

        Several captures may run at once. Only commits wait for each other, so that of two on one branch the later
        continues the earlier.

        Raises:
            BadRequest: both a request and a sequence are named.
            NotFound: no such request.
            Conflict, StoreFull, …: see `Repository.commit`.
        """
        return await self._to_the_end(self._snapshot(body))

    async def _snapshot(self, body: SnapshotBody) -> dict[str, Any]:
        started = time.perf_counter()
        if body.request_id is not None and body.sequence is not None:
            raise BadRequest("request_id and sequence: expected one of them, got both", param="sequence")
        core, repo, heads = await self.open()
        await core.describe()
        request_id = body.request_id if body.request_id is not None else body.sequence
        wanted = body.branch if body.branch is not None else body.name
        if wanted is not None:
            check_name(wanted)
            if body.parents is not None:  # what cannot be is refused before a page is copied
                await self._run(lambda: heads.parents([], wanted, body.parents))
        captured = await core.capture(request_id)
        async with self._commits:
            commit = _Commit(repo, heads, body, captured, wanted, list(self._engine_heads))
            done = await self._run(commit.run)
            heads.set([seq.id for seq in done.groups[0].sequences], done.snapshot.cid)
            if request_id is None:
                self._engine_heads = OrderedDict({done.snapshot.cid: None})
        return {
            "cid": done.snapshot.cid,
            "name": done.snapshot.name,
            "branch": done.branch,
            "parents": done.snapshot.parents,
            "tokens": done.snapshot.tokens,
            "pages": captured.pages,
            "pages_copied": captured.pages_copied,
            "new_bytes": captured.new_bytes,
            "pause_ms": _ms(captured.pause_s),
            "total_ms": _ms(time.perf_counter() - started),
            "sequences": [sequence_record(seq, done.groups[0]) for seq in done.groups[0].sequences],
        }

    # -- checkout ------------------------------------------------------------------------------------------------

    async def checkout(self, body: VllmCheckoutBody) -> dict[str, Any]:
        """Let requests continue a snapshot, and answer what became reachable.

        All its sequences become so, since the engine finds them by their tokens; with ``sequences``, only these are
        verified and told of.

        Raises:
            NotFound: no such snapshot, or no such sequence in it.
            LayoutMismatch: it was made by another model, in another layout, on other ranks.
            DamagedPage, MissingPage: the store has not what it names.
        """
        return await self._to_the_end(self._checkout(body))

    async def _checkout(self, body: VllmCheckoutBody) -> dict[str, Any]:
        started = time.perf_counter()
        core, repo, _ = await self.open()
        here = await core.describe()
        parts = await self._run(lambda: _parts(repo, body.cid, here))
        chosen = parts.chosen(body.sequences)
        if body.verify:
            await self._run(lambda: _verify(repo, chosen.manifests))
        await self._check_out(core, repo, parts)
        loaded = await core.preload(parts.cid) if body.preload else None
        first = chosen.groups[0]
        differences = _differences(dict(first.numerics), here.numerics)
        carried = {seq.id: seq.state.get("not_carried") for seq in first.sequences}
        return {
            "ok": True,
            "cid": parts.cid,
            "sequences": [sequence_record(seq, first) for seq in first.sequences],
            "restored_tokens": max(manifest.tokens for manifest in chosen.groups),
            "pages": sum(len(manifest.pages) for manifest in chosen.groups),
            "pages_loaded": loaded.pages_loaded if loaded is not None else 0,
            "bit_exact": not differences,
            "differences": differences,
            "not_carried": {name: texts for name, texts in carried.items() if texts},
            "total_ms": _ms(time.perf_counter() - started),
        }

    async def _check_out(self, core: Core, repo: Repository, parts: Parts) -> None:
        payload = await self._run(lambda: _payload(repo, parts))
        await core.check_out(payload)
        self._engine_heads[parts.cid] = None
        self._engine_heads.move_to_end(parts.cid)
        while len(self._engine_heads) > _HEADS_MAX:
            self._engine_heads.popitem(last=False)

    async def sequence(self, rev: str, sequence_id: str | None) -> tuple[str, LogicalSeq]:
        """The full cid of ``rev`` and one of its sequences, for a request that is to go on from there.

        Checked out, with this sequence's pages verified, unless the engine has the snapshot already.

        Raises:
            InvalidInput: the snapshot has several sequences and none was named, or it has none.
            NotFound, …: as `checkout`.
        """
        return await self._to_the_end(self._sequence(rev, sequence_id))

    async def _sequence(self, rev: str, sequence_id: str | None) -> tuple[str, LogicalSeq]:
        core, repo, _ = await self.open()
        here = await core.describe()
        parts = await self._run(lambda: _parts(repo, rev, here))
        if sequence_id is None:
            names = [seq.id for seq in parts.groups[0].sequences]
            if len(names) != 1:
                choice = ", ".join(map(repr, names[:20]))
                raise InvalidInput(f"{rev} holds {len(names)} sequences, expected the name of one of: {choice}")
            (sequence_id,) = names
        found = parts.sequence(sequence_id)
        chosen = parts.chosen([sequence_id])
        lock = self._checking.setdefault(parts.cid, asyncio.Lock())
        async with lock:  # twelve requests that name it at once read its pages once
            if parts.cid not in await core.checkouts():
                await self._run(lambda: _verify(repo, chosen.manifests))
                await self._check_out(core, repo, parts)
        return parts.cid, found

    def set_head(self, request_id: str, cid: str) -> None:
        """Say that a request, by the id that vLLM gives it, continues a snapshot."""
        if self._opened is not None:
            self._opened.heads.set([request_id], cid)


@dataclass(frozen=True, slots=True)
class _Committed:
    snapshot: Snapshot
    branch: str
    groups: list[Manifest]


@dataclass(frozen=True, slots=True)
class _Commit:
    """From a capture to a snapshot; in a thread."""

    repo: Repository
    heads: Heads
    body: SnapshotBody
    captured: Captured
    wanted: str | None
    engine_heads: list[str]

    def run(self) -> _Committed:
        body, repo = self.body, self.repo
        manifests = [repo.manifest(cid) for rank in self.captured.manifests for cid in rank]
        if not manifests:
            raise EngineError("the engine captured nothing, not even an empty manifest")
        groups = parts_of_rank(manifests, 0)
        names = [seq.id for seq in groups[0].sequences]
        is_whole = body.request_id is None and body.sequence is None
        branch = self.wanted if self.wanted is not None else "main" if is_whole else f"seq/{_common(names)}"
        heads = self.engine_heads if is_whole else [self._head(name) for name in names]
        for attempt in range(_COMMITS):
            parents = self.heads.parents(heads, branch, body.parents)
            try:
                snapshot = repo.commit(manifests, parents=parents, name=body.name, message=body.message, branch=branch)
            except Conflict:  # another process moved the branch in between: continue what it names now
                if body.parents is not None or attempt == _COMMITS - 1:
                    raise
            else:
                return _Committed(snapshot, branch, groups)
        raise AssertionError("unreachable")

    def _head(self, sequence_id: str) -> str | None:
        """HEAD of a sequence, or of the request of which it is one choice."""
        found = self.heads.of(sequence_id)
        while found is None and (less := _CHOICE.sub("", sequence_id, count=1)) != sequence_id:
            found, sequence_id = self.heads.of(less), less
        return found


# -- in threads ----------------------------------------------------------------------------------------------------


def _open(url: str) -> Repository:
    try:
        return Repository.open(url, create=True)
    except StoreError:
        raise
    except KvistError as error:  # what is wrong is the server's configuration or store, never the request
        raise StoreError(f"the store {url} cannot be opened: {error}", hint=error.hint) from error


def _parts(repo: Repository, rev: str, here: Description) -> Parts:
    """A snapshot's manifests, all of which must fit the engine."""
    cid = repo.resolve(rev)
    manifests = tuple(repo.manifest(name) for name in repo.snapshot(cid).manifests)
    layouts = {(layout.tp_rank, layout.group): layout for row in here.layouts for layout in row}
    of = f"snapshot {cid}"
    for manifest in manifests:
        place = manifest.layout.tp_rank, manifest.layout.group
        layouts.get(place, here.layouts[0][0]).require(manifest.layout, of=of, into="the engine")
    missing = layouts.keys() - {(manifest.layout.tp_rank, manifest.layout.group) for manifest in manifests}
    if missing:
        rank, group = min(missing)
        raise LayoutMismatch(f"{of} does not fit the engine: it has no pages of rank {rank}, group {group}")
    parts = Parts(cid, manifests, tuple(parts_of_rank(list(manifests), 0)))
    for manifest in manifests:
        if [seq.id for seq in manifest.sequences] != [seq.id for seq in parts.groups[0].sequences]:
            raise InvalidManifest(f"{of}: its manifests name different sequences")
    return parts


def _verify(repo: Repository, manifests: Iterable[Manifest]) -> None:
    digests = list(dict.fromkeys(digest for manifest in manifests for digest in manifest.digests))
    repo.pages.refresh()  # the engine's workers have put most of them, in other processes
    bad = repo.pages.verify(digests)
    if bad:
        raise repo.pages.absent(bad[0])


def _payload(repo: Repository, parts: Parts) -> dict[str, Any]:
    """What the engine core must know of a snapshot to find its pages."""
    rows: dict[int, list[str]] = {}
    for manifest, name in zip(parts.manifests, repo.snapshot(parts.cid).manifests, strict=True):
        rows.setdefault(manifest.layout.tp_rank, []).append(name)
    return {
        "cid": parts.cid,
        "manifests": list(rows.values()),
        "groups": [{"pages": [[page.ix, page.block] for page in manifest.pages]} for manifest in parts.groups],
        "sequences": [
            {
                "id": seqs[0].id,
                "token_ids": list(seqs[0].token_ids),
                "state": seqs[0].state,
                "groups": [
                    {"first_page": seq.first_page, "page_ixs": list(seq.page_ixs), "fill": seq.fill_in_last_page}
                    for seq in seqs
                ],
            }
            for seqs in zip(*(manifest.sequences for manifest in parts.groups), strict=True)
        ],
    }


def _chosen(manifest: Manifest, sequence_ids: Collection[str]) -> Manifest:
    sequences = tuple(seq for seq in manifest.sequences if seq.id in sequence_ids)
    needed = {ix for seq in sequences for ix in seq.page_ixs}
    return replace(manifest, pages=tuple(page for page in manifest.pages if page.ix in needed), sequences=sequences)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """What of the numerics is not the same in the snapshot and in the engine; ``null`` where one does not say."""
    return {
        name: {"snapshot": there.get(name), "engine": here.get(name)}
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    }


def _common(names: list[str]) -> str:
    """The name of a request, of which these are the choices."""
    return names[0] if len(names) == 1 else _CHOICE.sub("", names[0], count=1) if names else "none"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
