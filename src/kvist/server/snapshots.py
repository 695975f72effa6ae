"""The snapshot routes: snapshot, fork, checkout, and what a repository and an engine hold. Knows HTTP and sessions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import Response

from kvist.repo import LogicalSeq, RefKind, Snapshot
from kvist.server.errors import BadRequest
from kvist.server.openai import Requests
from kvist.server.schema import CheckoutBody, ForkBody, SnapshotBody, read_body
from kvist.server.sessions import Sessions
from kvist.server.wire import json_response

_LIMIT: Final = 100
_LIMIT_MAX: Final = 10_000


class Snapshots:
    """The endpoints, over one engine and one repository."""

    def __init__(self, sessions: Sessions, requests: Requests, body_max: int) -> None:
        self._sessions, self._requests, self._body_max = sessions, requests, body_max
        self._repo = sessions.repo
        # Their own threads: captures are long, and must not hold up the threads that submit requests.
        self._limiter = CapacityLimiter(8)

    async def snapshot(self, request: Request) -> Response:
        """``POST /v1/processfork/snapshot``."""
        body = await read_body(request, SnapshotBody, self._body_max)
        if body.request_id is not None and body.sequence is not None:
            raise BadRequest("request_id and sequence: expected one of them, got both", param="sequence")
        chosen: tuple[str, ...] | None = None
        branch = "main"
        if body.request_id is not None:
            found = self._requests.find(body.request_id)
            await found.started.wait()
            chosen = found.sequences
            branch = f"seq/{chosen[0] if len(chosen) == 1 else chosen[0].rpartition('/')[0]}"
        elif body.sequence is not None:
            chosen, branch = (body.sequence,), f"seq/{body.sequence}"
        wanted = body.branch if body.branch is not None else body.name
        return await self._run(lambda: self._snapshot(body, chosen, branch if wanted is None else wanted))

    def _snapshot(self, body: SnapshotBody, chosen: tuple[str, ...] | None, branch: str) -> dict[str, Any]:
        done = self._sessions.snapshot(
            chosen, branch=branch, name=body.name, message=body.message, parents=body.parents
        )
        snapshot = done.snapshot
        return {
            "cid": snapshot.cid,
            "name": snapshot.name,
            "branch": branch,
            "parents": snapshot.parents,
            "tokens": snapshot.tokens,
            "pages": done.pages,
            "pages_copied": done.pages_copied,
            "new_bytes": done.new_bytes,
            "pause_ms": _ms(done.pause_s),
            "total_ms": _ms(done.total_s),
            "sequences": [self._sequence(seq) for seq in self._sessions.manifest(snapshot.cid).sequences],
        }

    async def fork(self, request: Request) -> Response:
        """``POST /v1/processfork/fork``."""
        body = await read_body(request, ForkBody, self._body_max)

        def fork() -> dict[str, Any]:
            forks = self._repo.fork(body.cid, body.n, name=body.name)
            return {"cids": [fork.cid for fork in forks], "branches": [fork.name for fork in forks]}

        return await self._run(fork)

    async def checkout(self, request: Request) -> Response:
        """``POST /v1/processfork/checkout``."""
        body = await read_body(request, CheckoutBody, self._body_max)

        def checkout() -> dict[str, Any]:
            done = self._sessions.checkout(body.cid, body.sequences)
            restored = done.restored
            sequences = [
                {**self._sequence(session.sequence), "engine_id": session.engine_id} for session in done.sessions
            ]
            return {
                "ok": True,
                "cid": done.cid,
                "sequences": sequences,
                "restored_tokens": done.tokens,
                "pages": done.pages,
                "pages_loaded": restored.pages_loaded if restored else 0,
                "bit_exact": done.same_numerics,
                "pause_ms": _ms(restored.pause_s) if restored else 0.0,
                "total_ms": _ms(restored.total_s) if restored else 0.0,
            }

        return await self._run(checkout)

    async def log(self, request: Request) -> Response:
        """``GET /v1/processfork/snapshots``."""
        limit = request.query_params.get("limit", str(_LIMIT))
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= _LIMIT_MAX):
            raise BadRequest(f"limit: expected a number in [1, {_LIMIT_MAX}], got {limit!r:.80}", param="limit")
        rev = request.query_params.get("rev")

        def read() -> dict[str, Any]:
            refs = self._refs()
            found = self._repo.log(rev)
            listed = [self._record(snapshot, refs) for snapshot in found[: int(limit)]]
            return {"snapshots": listed, "total": len(found)}

        return await self._run(read)

    async def show(self, request: Request) -> Response:
        """``GET /v1/processfork/snapshots/{rev}``."""
        rev = request.path_params["rev"]

        def show() -> dict[str, Any]:
            snapshot = self._repo.snapshot(rev)
            manifest = self._sessions.manifest(snapshot.cid)
            return self._record(snapshot, self._refs()) | {
                "manifests": snapshot.manifests,
                "layout": msgspec.to_builtins(manifest.layout) | {"fingerprint": manifest.layout.fingerprint},
                "numerics": dict(manifest.numerics),
                "pages": len(manifest.pages),
                "sequences": [self._sequence(seq) | {"token_ids": seq.token_ids} for seq in manifest.sequences],
            }

        return await self._run(show)

    async def lineage(self, _: Request) -> Response:
        """``GET /v1/processfork/lineage``."""

        def lineage() -> dict[str, Any]:
            refs = self._refs()
            found = self._repo.log()
            return {
                "nodes": [self._record(snapshot, refs) for snapshot in found],
                "edges": [{"child": child.cid, "parent": parent} for child in found for parent in child.parents],
                "refs": [
                    {"kind": kind, "name": name, "cid": cid} for cid, names in refs.items() for kind, name in names
                ],
                "heads": self._sessions.engine_heads(),
            }

        return await self._run(lineage)

    async def sequences(self, _: Request) -> Response:
        """``GET /v1/processfork/sequences``."""

        def sequences() -> dict[str, Any]:
            infos = self._sessions.engine.sequences()
            return {"sequences": [msgspec.to_builtins(i) | {"head": self._sessions.head(i.id)} for i in infos]}

        return await self._run(sequences)

    async def drop(self, request: Request) -> Response:
        """``DELETE /v1/processfork/sequences/{id}``."""
        sequence_id = request.path_params["id"]

        def drop() -> dict[str, Any]:
            self._sessions.engine.drop(sequence_id)
            return {"ok": True, "id": sequence_id}

        return await self._run(drop)

    # -- as JSON -------------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[], dict[str, Any]]) -> Response:
        return json_response(await to_thread.run_sync(work, limiter=self._limiter))

    def _sequence(self, seq: LogicalSeq) -> dict[str, Any]:
        cached = seq.cached_tokens(self._sessions.engine.layout.page_size_tokens)
        return {"id": seq.id, "tokens": len(seq.token_ids) or cached, "cached_tokens": cached}

    def _refs(self) -> dict[str, list[tuple[str, str]]]:
        refs: dict[str, list[tuple[str, str]]] = {}
        for ref in self._repo.refs.all():
            if ref.cid is not None:
                refs.setdefault(ref.cid, []).append((RefKind(ref.kind).noun, ref.name))
        return refs

    @staticmethod
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


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
