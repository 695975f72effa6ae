"""The routes that need a repository and no engine: forks, the log, one snapshot, the graph. Knows HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvist.errors import MissingPage, NotFound, StoreError
from kvist.layout import Layout
from kvist.repo import LogicalSeq, Manifest, RefKind, Repository, Snapshot
from kvist.repo.config import CONFIG
from kvist.server.errors import BadRequest
from kvist.server.schema import ForkBody, read_body
from kvist.server.wire import json_response
from kvist.store import Store

_T = TypeVar("_T")
_LIMIT: Final = 100
_LIMIT_MAX: Final = 10_000

Run = Callable[[Callable[[], dict[str, Any]]], Awaitable[dict[str, Any]]]
"""Runs what blocks in a thread."""


class History:
    """The endpoints over one repository."""

    def __init__(
        self, repo: Repository, run: Run, heads: Callable[[], list[str]], body_max: int, *, rank: int = 0
    ) -> None:
        """
        Args:
            repo: what is read.
            run: each request's work goes through it.
            heads: the engine's heads.
            body_max: largest body, in bytes.
            rank: whose manifests are shown, where a snapshot has those of several ranks.
        """
        self._repo, self._run, self._heads, self._body_max, self._rank = repo, run, heads, body_max, rank

    async def fork(self, request: Request) -> Response:
        """``POST /v1/processfork/fork``."""
        body = await read_body(request, ForkBody, self._body_max)

        def fork() -> dict[str, Any]:
            forks = self._repo.fork(body.cid, body.n, name=body.name)
            return {"cids": [fork.cid for fork in forks], "branches": [fork.name for fork in forks]}

        return json_response(await self._run(fork))

    async def log(self, request: Request) -> Response:
        """``GET /v1/processfork/snapshots``."""
        limit = request.query_params.get("limit", str(_LIMIT))
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= _LIMIT_MAX):
            raise BadRequest(f"limit: expected a number in [1, {_LIMIT_MAX}], got {limit!r:.80}", param="limit")
        rev = request.query_params.get("rev")

        def read() -> dict[str, Any]:
            refs = self._refs()
            found = self._log(rev)
            listed = [_record(snapshot, refs) for snapshot in found[: int(limit)]]
            return {"snapshots": listed, "total": len(found)}

        return json_response(await self._run(read))

    async def show(self, request: Request) -> Response:
        """``GET /v1/processfork/snapshots/{rev}``."""
        rev = request.path_params["rev"]

        def show() -> dict[str, Any]:
            snapshot = self._repo.snapshot(rev)
            parts = parts_of_rank(self._repo.manifests(snapshot.cid), self._rank)
            first = parts[0]
            return _record(snapshot, self._refs()) | {
                "manifests": snapshot.manifests,
                "layout": layout_record(first.layout),
                "layouts": [layout_record(part.layout) for part in parts],
                "numerics": dict(first.numerics),
                "pages": sum(len(part.pages) for part in parts),
                "sequences": [sequence_record(seq, first) | {"token_ids": seq.token_ids} for seq in first.sequences],
            }

        return json_response(await self._run(show))

    async def lineage(self, _: Request) -> Response:
        """``GET /v1/processfork/lineage``."""

        def lineage() -> dict[str, Any]:
            refs = self._refs()
            found = self._log(None)
            return {
                "nodes": [_record(snapshot, refs) for snapshot in found],
                "edges": [{"child": child.cid, "parent": parent} for child in found for parent in child.parents],
                "refs": [
                    {"kind": kind, "name": name, "cid": cid} for cid, names in refs.items() for kind, name in names
                ],
                "heads": self._heads(),
            }

        return json_response(await self._run(lineage))

    def _log(self, rev: str | None) -> list[Snapshot]:
        """The snapshots, newest first. A store that is lost holds none, and says so."""
        found = self._repo.log(rev)
        if not found:
            require_present(self._repo.store)
        return found

    def _refs(self) -> dict[str, list[tuple[str, str]]]:
        refs: dict[str, list[tuple[str, str]]] = {}
        for ref in self._repo.refs.all():
            refs.setdefault(ref.cid, []).append((RefKind(ref.kind).noun, ref.name))
        return refs


def unless_lost(store: Store, work: Callable[[], _T]) -> _T:
    """What ``work`` gives. A store that is lost looks empty: what then is not found is told as that.

    Raises:
        StoreError: the store holds no repository any more.
    """
    try:
        return work()
    except (NotFound, MissingPage):
        require_present(store)
        raise


def require_present(store: Store) -> None:
    """Raise `StoreError` unless the store still holds its repository."""
    if store.head(CONFIG) is None:
        raise StoreError(f"{store.url} holds its repository no more: is the disk mounted?")


def parts_of_rank(manifests: list[Manifest], rank: int) -> list[Manifest]:
    """The manifests of one rank, by group; of the first rank there is, if it has none."""
    ranks = {manifest.layout.tp_rank for manifest in manifests}
    chosen = rank if rank in ranks else manifests[0].layout.tp_rank
    return [manifest for manifest in manifests if manifest.layout.tp_rank == chosen]


def sequence_record(seq: LogicalSeq, manifest: Manifest) -> dict[str, Any]:
    """How answers tell of a sequence: its name, ids and those of them whose KV the pages hold, and its cartridge."""
    cached = seq.cached_tokens(manifest.layout.page_size_tokens)
    record = {"id": seq.id, "tokens": len(seq.token_ids) or cached, "cached_tokens": cached}
    return record | {"cartridge": seq.state["cartridge"]} if "cartridge" in seq.state else record


def numeric_differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """What of the numerics is not the same in a snapshot and in an engine; ``null`` where one does not say."""
    return {
        name: {"snapshot": there.get(name), "engine": here.get(name)}
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    }


def not_carried(sequences: Iterable[LogicalSeq]) -> dict[str, Any]:
    """What of these sequences cannot go on as if it had never stopped, by sequence; as whoever captured them knew."""
    found = {seq.id: seq.state.get("not_carried") for seq in sequences}
    return {name: texts for name, texts in found.items() if texts}


def layout_record(layout: Layout) -> dict[str, Any]:
    """A layout as answers show it."""
    fields: dict[str, Any] = msgspec.to_builtins(layout)
    return fields | {"fingerprint": layout.fingerprint}


def _record(snapshot: Snapshot, refs: dict[str, list[tuple[str, str]]]) -> dict[str, Any]:
    return {
        "cid": snapshot.cid,
        "name": snapshot.name,
        "message": snapshot.message,
        "tokens": snapshot.tokens,
        "parents": snapshot.parents,
        "created_ns": snapshot.created_ns,
        "refs": [{"kind": kind, "name": name} for kind, name in refs.get(snapshot.cid, ())],
    }
