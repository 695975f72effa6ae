"""The engine as its API server reaches it: kvist's calls, typed, and its errors as ours.

Knows the calls. Must not know HTTP, repositories, or how an engine carries a call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import msgspec
from msgspec import Struct

from kvist.errors import EngineError, KvistError
from kvist.layout import Layout

_NOW: Final = 0.01
_SOON: Final = 0.1
"""Seconds between two questions: at first, and after a while."""


class Engine(Protocol):
    """What an adapter must offer of its engine. Two of the same engine are equal."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def store(self) -> str:
        """The url of the store that it was given.

        Raises:
            NoConnector: it was given none.
        """

    def option(self, name: str) -> str | None:
        """What its configuration of kvist says of an option that is text.

        Raises:
            InvalidInput: something else, which must not count as nothing.
        """

    def request_of(self, sequence: str) -> str:
        """The name of the request of which a sequence is one choice; its own name: of none.

        A name that tells apart twice, by choice and by prompt, loses one of the two a call.
        """

    async def call(self, op: str, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """The answer of `kvist.engines.paged.answers` to one call; errors come back in it.

        Raises:
            NoConnector: nobody there knows kvist's calls.
            EngineError: it did not answer.
        """

    async def pause(self) -> None:
        """Return when nothing is computed any more; requests stay as they are."""

    async def resume(self) -> None:
        """Undo it."""

    async def is_paused(self) -> bool:
        """Whether generation is paused, by whomever."""


class Description(Struct, frozen=True):
    """What an engine is.

    Attributes:
        layouts: by tensor-parallel rank, by KV cache group.
        numerics: what else decides the bits.
    """

    layouts: list[list[Layout]]
    numerics: dict[str, Any]


class _Described(Struct):
    layouts: list[list[dict[str, Any]]]
    numerics: dict[str, Any]


class _Begun(Struct):
    capture: str = ""
    needs_pause: bool = False
    pause_ms: float = 0.0


class _Copied(Struct):
    left: int
    busy: bool = False
    pause_ms: float = 0.0


class _Finished(Struct):
    done: bool
    manifests: list[list[str]] = []
    pages: int = 0
    pages_copied: int = 0
    new_bytes: int = 0


class Preloaded(Struct, frozen=True):
    """How far a preload is.

    Attributes:
        done: whether it has ended.
        pages: of the snapshot.
        pages_loaded: in host memory.
    """

    done: bool
    pages: int = 0
    pages_loaded: int = 0


class _Checkouts(Struct):
    cids: list[str]


class _Stats(Struct):
    ranks: list[dict[str, int | float]]


class _Nothing(Struct):
    """An answer that says nothing."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A capture whose pages and manifests are stored.

    Attributes:
        manifests: cids by rank, by group.
        pages: pages it holds, of one rank.
        pages_copied: of those, copied out of the engine.
        new_bytes: bytes that the repository did not have yet, of all ranks.
        pause_s: seconds for which the engine stood still.
    """

    manifests: list[list[str]]
    pages: int
    pages_copied: int
    new_bytes: int
    pause_s: float


_Answer = TypeVar("_Answer", bound=Struct)


class Core:
    """kvist's calls to one engine.

    Attributes:
        engine: what carries them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._description: Description | None = None
        self._pausing = asyncio.Lock()

    async def describe(self) -> Description:
        """What the engine is; asked once.

        Raises:
            NoConnector: the engine does not know kvist.
        """
        if self._description is None:
            described = await self.call("describe", {}, _Described)
            layouts = [[Layout.from_dict(layout) for layout in row] for row in described.layouts]
            self._description = Description(layouts, described.numerics)
        return self._description

    async def capture(self, request_id: str | None) -> Captured:
        """Bring a request, or everything (``None``), into the store: pages and manifests, not yet a snapshot.

        The engine stands still while pages are copied out, some at a time; generation is paused as a whole only where
        the sampler runs ahead of what the scheduler knows. To be cancelled by nobody who wants it to go on: whatever
        happens, generation goes on and the capture is released.

        Raises:
            NotFound: no such request.
            StoreFull, …: from storing.
        """
        started = time.perf_counter()
        capture, pause_s = await self._begin(request_id)
        try:
            waited = _NOW
            while True:
                copied = await self.call("copy", {"capture": capture}, _Copied)
                pause_s += copied.pause_ms / 1000
                if not copied.left:
                    break
                if copied.busy:
                    await asyncio.sleep(_NOW)
            while not (done := await self.call("finish", {"capture": capture}, _Finished)).done:
                await asyncio.sleep(waited)
                waited = min(2 * waited, _SOON)
        finally:
            await self.call("release", {"capture": capture}, _Nothing)
        pause_s = min(pause_s, time.perf_counter() - started)
        return Captured(done.manifests, done.pages, done.pages_copied, done.new_bytes, pause_s)

    async def _begin(self, request_id: str | None) -> tuple[str, float]:
        """A capture's name, and the seconds for which the engine stood still to begin it."""
        wanted = {"request_id": request_id}
        begun = await self.call("begin", wanted, _Begun)
        if not begun.needs_pause:
            return begun.capture, begun.pause_ms / 1000
        async with self._pausing:  # or the end of one pause would end another's
            is_ours = not await self.engine.is_paused()
            started = time.perf_counter()
            try:
                if is_ours:
                    await self.engine.pause()
                begun = await self.call("begin", wanted | {"paused": True}, _Begun)
            finally:
                if is_ours:
                    await self.engine.resume()
        if begun.needs_pause:
            raise EngineError("the engine asks for a pause while it is paused")
        return begun.capture, time.perf_counter() - started

    async def check_out(self, payload: Mapping[str, Any]) -> None:
        """Let requests continue a snapshot. Idempotent."""
        await self.call("checkout", payload, _Nothing)

    async def checkouts(self) -> list[str]:
        """Cids of the snapshots that requests may continue."""
        return (await self.call("checkouts", {}, _Checkouts)).cids

    async def stats(self) -> dict[str, int | float]:
        """What the first rank has done since it started."""
        return (await self.call("stats", {}, _Stats)).ranks[0]

    async def preload(self, cid: str) -> Preloaded:
        """Bring a snapshot's pages near; returns when they are."""
        waited = _NOW
        while not (loaded := await self.call("preload", {"cid": cid}, Preloaded)).done:
            await asyncio.sleep(waited)
            waited = min(2 * waited, _SOON)
        return loaded

    async def call(self, op: str, payload: Mapping[str, Any], kind: type[_Answer]) -> _Answer:
        """The answer to one call.

        Raises:
            KvistError: of the class whose ``kind`` the engine names; `EngineError` for all others.
        """
        answer = await self.engine.call(op, payload)
        if "error" in answer:
            raise error_of(answer["error"])
        try:
            return msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise EngineError(
                f"the engine's answer to {op} is not what this version of kvist knows: {error}"
            ) from error


def error_of(fields: Mapping[str, Any]) -> KvistError:
    """The error that the engine tells of."""
    kind, message, hint = fields.get("kind"), str(fields.get("message", "")), fields.get("hint")
    return _by_kind(KvistError).get(str(kind), EngineError)(message, hint=hint)


def _by_kind(root: type[KvistError]) -> dict[str, type[KvistError]]:
    """Error classes by the kind that they define themselves."""
    found = {root.kind: root} if "kind" in vars(root) else {}
    for child in root.__subclasses__():
        found |= _by_kind(child)
    return found
