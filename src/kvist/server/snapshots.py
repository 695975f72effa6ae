"""The routes that need the engine: snapshot, checkout, and the sequences it holds. Knows HTTP and sessions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request
from starlette.responses import Response

from kvist.server.errors import BadRequest
from kvist.server.history import History, layout_record, not_carried, sequence_record, unless_lost
from kvist.server.openai import Requests
from kvist.server.schema import CheckoutBody, SnapshotBody, read_body
from kvist.server.sessions import Sessions
from kvist.server.wire import json_response


class Snapshots:
    """The endpoints, over one engine and one repository.

    Attributes:
        history: those that need no engine.
    """

    def __init__(self, sessions: Sessions, requests: Requests, body_max: int) -> None:
        self._sessions, self._requests, self._body_max = sessions, requests, body_max
        # Their own threads: captures are long, and must not hold up the threads that submit requests.
        self._limiter = CapacityLimiter(8)
        rank = sessions.engine.layout.tp_rank
        self.history = History(sessions.repo, self._run, sessions.engine_heads, body_max, rank=rank)

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
        return json_response(
            await self._run(lambda: self._snapshot(body, chosen, branch if wanted is None else wanted))
        )

    def _snapshot(self, body: SnapshotBody, chosen: tuple[str, ...] | None, branch: str) -> dict[str, Any]:
        done = self._sessions.snapshot(
            chosen, branch=branch, name=body.name, message=body.message, parents=body.parents
        )
        snapshot = done.snapshot
        manifest = self._sessions.manifest(snapshot.cid)
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
            "sequences": [sequence_record(seq, manifest) for seq in manifest.sequences],
        }

    async def checkout(self, request: Request) -> Response:
        """``POST /v1/processfork/checkout``."""
        body = await read_body(request, CheckoutBody, self._body_max)

        def checkout() -> dict[str, Any]:
            done = self._sessions.checkout(body.cid, body.sequences)
            restored = done.restored
            manifest = self._sessions.manifest(done.cid)
            sequences = [
                sequence_record(session.sequence, manifest) | {"engine_id": session.engine_id}
                for session in done.sessions
            ]
            return {
                "ok": True,
                "cid": done.cid,
                "sequences": sequences,
                "restored_tokens": done.tokens,
                "pages": done.pages,
                "pages_loaded": restored.pages_loaded if restored else 0,
                "bit_exact": not done.differences,
                "differences": done.differences,
                "not_carried": not_carried(session.sequence for session in done.sessions),
                "pause_ms": _ms(restored.pause_s) if restored else 0.0,
                "total_ms": _ms(restored.total_s) if restored else 0.0,
            }

        return json_response(await self._run(checkout))

    async def layout(self, _: Request) -> Response:
        """``GET /v1/processfork/layout``."""
        engine = self._sessions.engine
        return json_response({"layouts": [layout_record(engine.layout)], "numerics": engine.numerics()})

    async def stats(self, _: Request) -> Response:
        """``GET /v1/processfork/stats``."""
        moved = self._sessions.moved
        return json_response(dataclasses.asdict(moved) | {"pages_read": moved.pages_loaded})

    async def sequences(self, _: Request) -> Response:
        """``GET /v1/processfork/sequences``."""

        def sequences() -> dict[str, Any]:
            infos = self._sessions.engine.sequences()
            return {"sequences": [msgspec.to_builtins(i) | {"head": self._sessions.head(i.id)} for i in infos]}

        return json_response(await self._run(sequences))

    async def drop(self, request: Request) -> Response:
        """``DELETE /v1/processfork/sequences/{id}``."""
        sequence_id = request.path_params["id"]

        def drop() -> dict[str, Any]:
            self._sessions.engine.drop(sequence_id)
            return {"ok": True, "id": sequence_id}

        return json_response(await self._run(drop))

    async def _run(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        store = self._sessions.repo.store
        return await to_thread.run_sync(lambda: unless_lost(store, work), limiter=self._limiter)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
