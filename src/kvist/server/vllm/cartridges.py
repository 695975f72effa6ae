"""The cartridges of a vLLM: its library, and what its workers did. Knows vLLM's engine client; imports no vllm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from kvist.cartridge.library import Entry
from kvist.errors import EngineError, NotFound
from kvist.server.live.client import Core
from kvist.server.vllm.client import EngineClient, VllmEngine

if TYPE_CHECKING:
    from kvist.cartridge.library import Library
    from kvist.cartridge.manifest import CartridgeManifest


class _Stats(Struct):
    ranks: list[dict[str, Any]]


class Cartridges:
    """What the routes need of an engine, once there is one."""

    def __init__(self) -> None:
        self._engine: EngineClient | None = None

    def attach(self, engine: EngineClient | None) -> None:
        """Take the engine; again and again, where there is no better moment."""
        if engine is not None:
            self._engine = engine

    @property
    def is_served(self) -> bool:
        """Whether the engine has cartridges."""
        return _frontend_of(self._engine) is not None

    def library(self) -> Library:
        """What requests may use.

        Raises:
            EngineError: there is no engine yet.
            NotFound: it was started without cartridges.
        """
        if self._engine is None:
            raise EngineError("this server has no engine, or is still starting")
        frontend = _frontend_of(self._engine)
        if frontend is None:
            raise NotFound(
                "this server was started without cartridges",
                hint="give vLLM a --kv-transfer-config with the connector CartridgeConnector of "
                "kvist.engines.vllm.cartridges",
            )
        library: Library = frontend.library
        return library

    def admit(self, library: Library, manifest: CartridgeManifest, directory: Path) -> None:
        """Refuse to register what no request could use.

        Raises:
            KvistError: see `kvist.engines.vllm.cartridges.frontend.Frontend.check`.
        """
        _frontend_of(self._engine).check(Entry(manifest.cartridge_id, directory, manifest))

    async def stats(self) -> dict[str, Any]:
        """What the workers have done since they started, by rank.

        Raises:
            NotFound: as `library`.
        """
        self.library()
        assert self._engine is not None
        return {"ranks": (await Core(VllmEngine(self._engine)).call("cartridge_stats", {}, _Stats)).ranks}


def _frontend_of(engine: EngineClient | None) -> Any:
    """The front end that `kvist.engines.vllm.intake` gave the engine; ``None``: it has no cartridges, or no hooks."""
    processor = getattr(engine, "input_processor", None)
    frontends = getattr(getattr(processor, "process_inputs", None), "frontends", None)
    return None if frontends is None else frontends.of(processor)
