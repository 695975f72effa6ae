"""The engine's end of the calls that `kvist.server.live` makes: one table, answers as plain values, errors among them.

Knows the calls and who does the work. Must not know how a call reaches the engine, nor how an answer goes back.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from kvist.engines.paged.matching import Stored, first_block
from kvist.engines.paged.plans import CapturePlan
from kvist.errors import EngineError, InvalidInput, InvalidManifest, KvistError
from kvist.layout import Layout

log = logging.getLogger("kvist.paged")


class Decider(Protocol):
    """Which requests hold which pages, and what they may take. Asked in the engine's thread, between two steps."""

    @property
    def layouts(self) -> Sequence[Layout]:
        """Rank 0's, by group."""

    @property
    def windows(self) -> Sequence[int | None]:
        """By group: the tokens that one looks back on, itself included, or ``None``: all."""

    @property
    def checkouts(self) -> list[str]:
        """Cids of the snapshots that requests may continue."""

    def content(self, cid: str) -> str:
        """What a snapshot that is checked out holds, or raise `NotFound`."""

    def check_out(
        self, cid: str, content: str, by_hash: list[dict[bytes, int]], sequences: Sequence[Stored]
    ) -> list[str]:
        """Let requests continue a snapshot. Returns contents that none can continue any more."""

    def capture(self, wanted: str | None) -> CapturePlan:
        """Decide what a snapshot of a request, or of everything (``None``), holds, and keep it in place.

        Raises:
            NotFound: no such request.
        """

    def gone(self, capture: str) -> list[tuple[int, int]]:
        """Group and block of the pages of a capture that are lost since the last call: their block was reused."""

    def release(self, capture: str) -> None:
        """Let go of what a capture keeps. Idempotent."""


class Engine(Protocol):
    """An engine as calls find it."""

    @property
    def decider(self) -> Decider:
        """Its deciding side."""

    def must_pause(self, wanted: str | None) -> bool:
        """Whether a capture can only begin while generation is paused as a whole."""

    def begin(self, plan: CapturePlan) -> None:
        """Begin a capture on every rank; see `Captures.begin`."""

    def ranks(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every rank's `PageMover`, by its dotted name; the first error of any rank is raised."""


Call = Callable[[Engine, Mapping[str, Any]], dict[str, Any]]


def answer(op: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns, or the error that it raises, as a value: what carries it back may keep only its text.

    An answer is encoded here once before the engine does: one that it could not encode might end its output thread.
    """
    try:
        found = work()
        msgspec.msgpack.encode(found)
        return found
    except KvistError as error:
        return _error(error)
    except Exception as error:
        log.exception("kvist call %s failed", op)
        return _error(EngineError(f"{type(error).__name__}: {error}"))


def call(engine: Engine, op: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one call.

    Raises:
        InvalidInput: there is none of this name.
        KvistError: whatever the call raises.
    """
    if op not in _CALLS:
        raise InvalidInput(f"unknown call {op!r:.80}")
    return _CALLS[op](engine, payload)


def _error(error: KvistError) -> dict[str, Any]:
    return {"error": {"kind": error.kind, "message": str(error), "hint": error.hint}}


def _describe(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    described = engine.ranks("describe")
    return {"layouts": [layouts for layouts, _ in described], "numerics": described[0][1]}


# -- snapshots -----------------------------------------------------------------------------------------------------


def _begin(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    started, wanted = time.perf_counter(), payload.get("request_id")
    if not payload.get("paused") and engine.must_pause(wanted):
        return {"needs_pause": True}
    plan = engine.decider.capture(wanted)
    try:
        engine.begin(plan)
    except BaseException:
        _release(engine, {"capture": plan.id})
        raise
    return {
        "needs_pause": False,
        "capture": plan.id,
        "pages": len(plan.places),
        "sequences": [
            {"id": seq.id, "tokens": len(seq.token_ids), "cached_tokens": seq.cached} for seq in plan.sequences
        ],
        "pause_ms": (time.perf_counter() - started) * 1000,
    }


def _copy(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    capture = payload["capture"]
    answers = engine.ranks("captures.copy", capture, engine.decider.gone(capture))
    return {
        "left": max(answer["left"] for answer in answers),
        "busy": any(answer["busy"] for answer in answers),
        "pause_ms": (time.perf_counter() - started) * 1000,
    }


def _finish(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    answers = engine.ranks("captures.finish", payload["capture"])
    if not all(answer["done"] for answer in answers):
        return {"done": False}
    first = answers[0]
    return {
        "done": True,
        "manifests": [answer["manifests"] for answer in answers],
        "pages": first["pages"],
        "pages_copied": first["pages_copied"],
        "new_bytes": sum(answer["new_bytes"] for answer in answers),
    }


def _release(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    engine.decider.release(payload["capture"])
    engine.ranks("captures.release", payload["capture"])
    return {}


# -- checkouts -----------------------------------------------------------------------------------------------------


def _checkout(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    content = _content(payload["manifests"])
    engine.ranks("fetching.open", content, payload["manifests"])
    by_hash = [
        {bytes.fromhex(name): ix for ix, name in group["pages"] if name is not None} for group in payload["groups"]
    ]
    decider = engine.decider
    size = decider.layouts[0].page_size_tokens
    sequences = [_stored(sequence, size, decider.windows) for sequence in payload["sequences"]]
    dropped = decider.check_out(payload["cid"], content, by_hash, sequences)
    if dropped:
        engine.ranks("fetching.forget", dropped)
    return {"ok": True}


def _content(manifests: Sequence[Sequence[str]]) -> str:
    """One name for what the manifests of all ranks and groups hold."""
    return hashlib.sha256(" ".join(cid for rank in manifests for cid in rank).encode()).hexdigest()


def _stored(sequence: Mapping[str, Any], size: int, windows: Sequence[int | None]) -> Stored:
    """A sequence as requests may match it.

    Raises:
        InvalidManifest: its groups do not fit together, or its state is none of ours.
    """
    pages: list[list[int | None]] = []
    cached: set[int] = set()
    for group in sequence["groups"]:
        held: list[int | None] = [None] * group["first_page"] + list(group["page_ixs"])
        pages.append(held)
        cached.add((len(held) - 1) * size + (group["fill"] or size) if group["page_ixs"] else 0)
    tokens, state = next(iter(cached)), sequence["state"]
    fits = (
        len(cached) == 1
        and len(sequence["token_ids"]) >= tokens
        and all(
            group["first_page"] <= first_block(tokens, window, size)
            for group, window in zip(sequence["groups"], windows, strict=True)
        )
    )
    if tokens and not fits:
        raise InvalidManifest(f"sequence {sequence['id']!r}: its groups hold different tokens, or not its whole window")
    prompt, rng, sampling = state.get("prompt_tokens", 0), state.get("rng", ""), state.get("sampling", {})
    if type(prompt) is not int or not isinstance(rng, str) or not isinstance(sampling, dict):
        raise InvalidManifest(f"sequence {sequence['id']!r}: prompt_tokens, rng or sampling in its state are not ours")
    try:
        base64.b64decode(rng, validate=True)
    except ValueError:
        raise InvalidManifest(f"sequence {sequence['id']!r}: rng in its state is not base64") from None
    return Stored(sequence["id"], list(sequence["token_ids"]), tokens, pages, state)


def _preload(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    answers = engine.ranks("fetching.preload", engine.decider.content(payload["cid"]))
    return {
        "done": all(answer["done"] for answer in answers),
        "pages": answers[0]["pages"],
        "pages_loaded": min(answer["pages_loaded"] for answer in answers),
    }


def _checkouts(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {"cids": engine.decider.checkouts}


def _stats(engine: Engine, payload: Mapping[str, Any]) -> dict[str, Any]:
    return {"ranks": engine.ranks("stats")}


_CALLS: Final[dict[str, Call]] = {
    "describe": _describe,
    "begin": _begin,
    "copy": _copy,
    "finish": _finish,
    "release": _release,
    "checkout": _checkout,
    "checkouts": _checkouts,
    "preload": _preload,
    "stats": _stats,
}
