"""The engine as the API server reaches it: kvist's calls into the engine core, typed, and its errors as ours.

Knows the calls and vLLM's engine client. Must not know HTTP or repositories.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import msgspec
from msgspec import Struct

from kvist.errors import EngineError, InvalidInput, KvistError
from kvist.layout import Layout
from kvist.server.errors import NoConnector

_CALL: Final = "kvist"
_NOW: Final = 0.01
_SOON: Final = 0.1
"""Seconds between two questions: at first, and after a while."""
_CONFIG: Final = (
    '--kv-transfer-config \'{"kv_connector": "KvistConnector", "kv_connector_module_path": '
    '"kvist.engines.vllm.connector", "kv_role": "kv_both", "kv_connector_extra_config": '
    '{"store": "file:///srv/kv"}}\''
)


class EngineClient(Protocol):
    """What of vLLM's engine client is used here (0.28 to 0.32)."""

    @property
    def vllm_config(self) -> Any:
        """vLLM's configuration."""

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call ``method``; the answers of all who were called."""

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Return when nothing is computed any more; ``mode="keep"``: requests stay as they are."""

    async def resume_generation(self) -> None:
        """Undo it."""

    async def is_paused(self) -> bool:
        """Whether it is paused."""


class Description(Struct, frozen=True):
    """What an engine is.

    Attributes:
        layouts: by tensor-parallel rank, by KV cache group.
        numerics: what else decides the bits.
        max_model_len: tokens of a sequence.
        mode: ``snapshots`` or ``write_through``.
        vllm: its version.
        prefix_caching, async_scheduling: whether vLLM does that.
    """

    layouts: list[list[Layout]]
    numerics: dict[str, Any]
    max_model_len: int
    prefix_caching: bool = True
    async_scheduling: bool = False
    mode: str = "snapshots"
    vllm: str = ""


class _Described(Struct):
    layouts: list[list[dict[str, Any]]]


class _Begun(Struct):
    capture: str = ""
    needs_pause: bool = False


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
    """The engine core behind an engine client.

    Attributes:
        engine: vLLM's engine client.
    """

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine
        self._description: Description | None = None
        self._pausing = asyncio.Lock()

    @property
    def store(self) -> str:
        """The url of the store that the engine was given.

        Raises:
            NoConnector: it was given none.
        """
        transfer = getattr(self.engine.vllm_config, "kv_transfer_config", None)
        store = self.option("store")
        if store is None:
            raise NoConnector(
                f"expected an engine with the connector KvistConnector and its store, got "
                f"{getattr(transfer, 'kv_connector', None) or 'no connector'}",
                hint=f"start vLLM with VLLM_PLUGINS=kvist and {_CONFIG}",
            )
        return store

    def option(self, name: str) -> str | None:
        """What our connector's ``kv_connector_extra_config`` says of an option that is text.

        Raises:
            InvalidInput: something else, which must not count as nothing.
        """
        transfer = getattr(self.engine.vllm_config, "kv_transfer_config", None)
        found = _options(getattr(transfer, "kv_connector", None), transfer).get(name)
        if found is not None and (not isinstance(found, str) or not found):
            raise InvalidInput(f"kv_connector_extra_config: {name} is text, got {found!r:.80}")
        return found

    # -- the calls -----------------------------------------------------------------------------------------------

    async def describe(self) -> Description:
        """What the engine is; asked once.

        Raises:
            NoConnector: the engine core does not know kvist.
        """
        if self._description is None:
            fields = await self._call("describe", {})
            rows = _convert(fields, _Described, "describe").layouts
            layouts = [[Layout.from_dict(layout) for layout in row] for row in rows]
            self._description = _convert(fields | {"layouts": []}, Description, "describe")
            self._description = msgspec.structs.replace(self._description, layouts=layouts)
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
            await self._call("release", {"capture": capture})
        pause_s = min(pause_s, time.perf_counter() - started)
        return Captured(done.manifests, done.pages, done.pages_copied, done.new_bytes, pause_s)

    async def check_out(self, payload: Mapping[str, Any]) -> None:
        """Let requests continue a snapshot. Idempotent."""
        await self._call("checkout", payload)

    async def checkouts(self) -> list[str]:
        """Cids of the snapshots that requests may continue."""
        return (await self.call("checkouts", {}, _Checkouts)).cids

    async def stats(self) -> dict[str, int | float]:
        """What the workers have done since they started, by rank."""
        return (await self.call("stats", {}, _Stats)).ranks[0]

    async def cartridge_stats(self) -> dict[str, Any]:
        """What the workers have done with cartridges since they started, by rank."""
        return await self._call("cartridge_stats", {})

    async def preload(self, cid: str) -> Preloaded:
        """Bring a snapshot's pages near; returns when they are."""
        waited = _NOW
        while not (loaded := await self.call("preload", {"cid": cid}, Preloaded)).done:
            await asyncio.sleep(waited)
            waited = min(2 * waited, _SOON)
        return loaded

    async def _begin(self, request_id: str | None) -> tuple[str, float]:
        """A capture's name, and the seconds for which generation was paused to begin it."""
        wanted = {"request_id": request_id}
        begun = await self.call("begin", wanted, _Begun)
        if not begun.needs_pause:
            return begun.capture, 0.0
        async with self._pausing:  # or the end of one pause would end another's
            is_ours = not await self.engine.is_paused()
            started = time.perf_counter()
            try:
                if is_ours:
                    await self.engine.pause_generation(mode="keep", clear_cache=False)
                begun = await self.call("begin", wanted | {"paused": True}, _Begun)
            finally:
                if is_ours:
                    await self.engine.resume_generation()
        if begun.needs_pause:
            raise EngineError("the engine asks for a pause while it is paused")
        return begun.capture, time.perf_counter() - started

    async def call(self, op: str, payload: Mapping[str, Any], answer: type[_Answer]) -> _Answer:
        """The answer to one call.

        Raises:
            KvistError: of the class whose ``kind`` the engine names; `EngineError` for all others.
        """
        return _convert(await self._call(op, payload), answer, op)

    async def _call(self, op: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        try:
            answers: Sequence[Any] = await self.engine.collective_rpc(_CALL, args=(op, dict(payload)))
        except Exception as error:  # of vLLM's own classes, or a bare Exception with the text of one elsewhere
            if op == "describe" and not getattr(self.engine, "errored", False):
                raise NoConnector(
                    f"the engine core does not answer kvist's calls: {error}",
                    hint="VLLM_PLUGINS must name kvist where vLLM is started",
                ) from error
            raise EngineError(f"the engine did not answer {op}: {error or type(error).__name__}") from error
        if len(answers) != 1 or not isinstance(answers[0], dict):
            raise EngineError(f"expected one answer to {op}, got {answers!r:.200}")
        answer: dict[str, Any] = answers[0]
        if "error" in answer:
            raise error_of(answer["error"])
        return answer


def error_of(fields: Mapping[str, Any]) -> KvistError:
    """The error that the engine core tells of."""
    kind, message, hint = fields.get("kind"), str(fields.get("message", "")), fields.get("hint")
    return _by_kind(KvistError).get(str(kind), EngineError)(message, hint=hint)


def _by_kind(root: type[KvistError]) -> dict[str, type[KvistError]]:
    """Error classes by the kind that they define themselves."""
    found = {root.kind: root} if "kind" in vars(root) else {}
    for child in root.__subclasses__():
        found |= _by_kind(child)
    return found


def _convert(answer: Mapping[str, Any], kind: type[_Answer], op: str) -> _Answer:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise EngineError(f"the engine's answer to {op} is not what this version of kvist knows: {error}") from error


def _options(connector: str | None, transfer: Any) -> Mapping[str, Any]:
    """The options of our connector, which may be one of several under vLLM's ``MultiConnector``; none, without it."""
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    if connector == "KvistConnector":
        return extra if isinstance(extra, Mapping) else {}
    for child in extra.get("connectors", ()):
        if isinstance(child, Mapping) and child.get("kv_connector") == "KvistConnector":
            return child.get("kv_connector_extra_config") or {}
    return {}
