"""Snapshots of a live engine: captured, committed, checked out. Puts an engine and a repository together.

Knows both, and the answers' fields. Must not know HTTP.

The engine's ranks bring pages and manifests into the store and take pages out of it; this process reads
manifests, checks them against the engine, and commits. What it remembers (heads) is its own: with several API servers,
each has its own heads, and the branch's tip, which becomes a parent, connects them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread

from kvist.errors import (
    EngineError,
    InvalidInput,
    KvistError,
    StoreError,
)
from kvist.ids import check_name
from kvist.repo import LogicalSeq, Repository
from kvist.repo.keeper import Keeper
from kvist.repo.signing import Trust
from kvist.server.errors import BadRequest, NoConnector
from kvist.server.heads import Heads
from kvist.server.history import (
    History,
    layout_record,
    not_carried,
    numeric_differences,
    sequence_record,
    unless_lost,
)
from kvist.server.live.client import Core, Engine
from kvist.server.live.commits import Commit
from kvist.server.live.parts import Parts, payload_of, read_parts, verify_pages
from kvist.server.schema import BODY_MAX, CheckoutBody, SnapshotBody
from kvist.server.tenants import open_tenant
from kvist.store import Store, open_store
from kvist.telemetry import operation

log = logging.getLogger("kvist.server")

_T = TypeVar("_T")
_HEADS_MAX: Final = 64


class _Opened:
    """An engine and the repository that it writes to, once both are reached."""

    def __init__(self, core: Core, store: Store, repo: Repository) -> None:
        self.core, self.store, self.repo, self.heads = core, store, repo, Heads(repo)
        self.tenants: dict[str, Repository] = {}
        self.opening: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.keepers: list[Keeper[Snapshots]] = []


class Snapshots:
    """One engine's snapshots. Lives in the event loop of the API server; what blocks runs in threads."""

    def __init__(self) -> None:
        self._core: Core | None = None
        self._opened: _Opened | None = None
        self._opening, self._commits = asyncio.Lock(), asyncio.Lock()
        self._checking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._engine_heads: OrderedDict[str, None] = OrderedDict()
        self._limiter = CapacityLimiter(8)
        self._salts: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- reaching engine and repository --------------------------------------------------------------------------

    def attach(self, engine: Engine | None) -> None:
        """Say which engine it is; ``None``: this server has none. Reaches nothing yet."""
        if engine is not None and (self._core is None or self._core.engine != engine):
            self._core, self._opened = Core(engine), None

    async def open(self) -> tuple[Core, Repository, Heads]:
        """Engine and repository, opened on first use, and tried again on the next if it fails.

        Raises:
            NoConnector: the engine has no connector of ours.
            StoreError: the store cannot be reached, or holds no repository that can be read.
        """
        opened = self._opened or await self._open()
        return opened.core, opened.repo, opened.heads

    async def _open(self) -> _Opened:
        if self._core is None:
            raise EngineError("this server has no engine, or is still starting")
        async with self._opening:
            if self._opened is None:
                core = self._core
                store, repo = await to_thread.run_sync(_open, core, limiter=self._limiter)
                self._opened = _Opened(core, store, repo)
                self._opened.keepers.append(self._keeper(core.engine.name, repo))
        return self._opened

    async def tenant(self, name: str) -> Repository:
        """The repository of a tenant, opened on first use; raises as `open`. Only its own requests wait for it."""
        opened = self._opened or await self._open()
        if name not in opened.tenants:
            async with opened.opening.setdefault(name, asyncio.Lock()):
                if name not in opened.tenants:
                    open_repository = partial(Repository.open, trust=opened.repo.trust)
                    opening = partial(open_tenant, opened.store, name, open_repository)
                    # nothing of it is ever checked out here, so that nothing need be kept from its gc
                    opened.tenants[name] = await to_thread.run_sync(opening, limiter=self._limiter)
        return opened.tenants[name]

    def _keeper(self, engine: str, repo: Repository) -> Keeper[Snapshots]:
        """Keeps a gc from what of ``repo`` is checked out: the engine reads its pages when a request needs them."""
        return Keeper(repo, self, lambda me: list(me._engine_heads), holder=f"{engine}, process {os.getpid()}")

    def _hold(self) -> None:
        """What is checked out has changed."""
        for keeper in self._opened.keepers if self._opened is not None else ():
            keeper.nudge()

    async def salt_of(self, tenant: str) -> str:
        """The salt of a tenant's blocks; where the engine has no store, one of this process's."""
        try:
            return (await self.tenant(tenant)).config.block_salt
        except NoConnector:
            return self._salts.setdefault(tenant, secrets.token_hex(32))

    async def history(self, body_max: int = BODY_MAX, tenant: str | None = None) -> History:
        """The routes that need the repository only: the engine's, or a tenant's."""
        if tenant is not None:
            return History(await self.tenant(tenant), self._run, list, body_max)
        _, repo, _ = await self.open()
        return History(repo, self._run, lambda: list(self._engine_heads), body_max)

    async def layout(self) -> dict[str, Any]:
        """What pages must be to fit the engine, and how it computes."""
        core, _, _ = await self.open()
        here = await core.describe()
        layouts = [layout_record(layout) for rank in here.layouts for layout in rank]
        return {"layouts": layouts, "numerics": here.numerics}

    async def stats(self) -> dict[str, int | float]:
        """What the engine's first rank has done since it started."""
        core, _, _ = await self.open()
        return await core.stats()

    async def _run(self, work: Callable[[], _T]) -> _T:
        """``work`` in a thread, where a lost store is told as that."""
        if (opened := self._opened) is not None:
            work = partial(unless_lost, opened.store, work)
        return await to_thread.run_sync(work, limiter=self._limiter)

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
        return await self._to_the_end(_told("snapshot", self._snapshot(body)))

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
            commit = Commit(repo, heads, body, captured, wanted, list(self._engine_heads), core.engine.request_of)
            done = await self._run(commit.run)
            heads.set([seq.id for seq in done.groups[0].sequences], done.snapshot.cid)
            if request_id is None:
                self._engine_heads = OrderedDict({done.snapshot.cid: None})
                self._hold()
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

    async def checkout(self, body: CheckoutBody) -> dict[str, Any]:
        """Let requests continue a snapshot, and answer what became reachable.

        All its sequences become so, since the engine finds them by their tokens; with ``sequences``, only these are
        verified and told of.

        Raises:
            NotFound: no such snapshot, or no such sequence in it.
            LayoutMismatch: it was made by another model, in another layout, on other ranks.
            DamagedPage, MissingPage: the store has not what it names.
        """
        return await self._to_the_end(_told("checkout", self._checkout(body)))

    async def _checkout(self, body: CheckoutBody) -> dict[str, Any]:
        started = time.perf_counter()
        core, repo, _ = await self.open()
        here = await core.describe()
        parts = await self._run(lambda: read_parts(repo, body.cid, here))
        chosen = parts.chosen(body.sequences)
        if body.verify:
            await self._run(lambda: verify_pages(repo, chosen.manifests))
        await self._check_out(core, repo, parts)
        loaded = await core.preload(parts.cid) if body.preload else None
        first = chosen.groups[0]
        differences = numeric_differences(dict(first.numerics), here.numerics)
        return {
            "ok": True,
            "cid": parts.cid,
            "sequences": [sequence_record(seq, first) for seq in first.sequences],
            "restored_tokens": max(manifest.tokens for manifest in chosen.groups),
            "pages": sum(len(manifest.pages) for manifest in chosen.groups),
            "pages_loaded": loaded.pages_loaded if loaded is not None else 0,
            "bit_exact": not differences,
            "differences": differences,
            "not_carried": not_carried(first.sequences),
            "total_ms": _ms(time.perf_counter() - started),
        }

    async def _check_out(self, core: Core, repo: Repository, parts: Parts) -> None:
        payload = await self._run(lambda: payload_of(repo, parts))
        await core.check_out(payload)
        self._engine_heads[parts.cid] = None
        self._engine_heads.move_to_end(parts.cid)
        while len(self._engine_heads) > _HEADS_MAX:
            self._engine_heads.popitem(last=False)
        self._hold()

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
        parts = await self._run(lambda: read_parts(repo, rev, here))
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
                await self._run(lambda: verify_pages(repo, chosen.manifests))
                await self._check_out(core, repo, parts)
        return parts.cid, found

    def set_head(self, request_id: str, cid: str) -> None:
        """Say that a request, by the id that the engine gives it, continues a snapshot."""
        if self._opened is not None:
            self._opened.heads.set([request_id], cid)


# -- in threads ----------------------------------------------------------------------------------------------------


def _open(core: Core) -> tuple[Store, Repository]:
    """The engine's store, and the repository in it."""
    url = core.engine.store
    try:
        trusted = core.engine.option("trusted_keys") or os.environ.get("KVIST_TRUSTED_KEYS")
        store = open_store(url)
        trust = Trust.load(Path(trusted)) if trusted else None
        return store, Repository.open(store, create=True, trust=trust)
    except StoreError:
        raise
    except KvistError as error:  # what is wrong is the server's configuration or store, never the request
        raise StoreError(f"the store {url} cannot be opened: {error}", hint=error.hint) from error


async def _told(name: str, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` answers, as an operation."""
    with operation(name) as done:
        answer = await work
        done.add(nbytes=answer.get("new_bytes", 0), pages=2 * answer.get("pages_copied", 0))
        return answer


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
