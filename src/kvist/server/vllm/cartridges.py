"""The cartridges of a vLLM: its library, and what its workers did. Knows vLLM's engine client; imports no vllm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvist.errors import EngineError, NotFound
from kvist.server.vllm.client import Core, EngineClient

if TYPE_CHECKING:
    from kvist.cartridge.library import Library


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
        from kvist.engines.vllm.intake import frontend_of  # where there is an engine client, there is vLLM

        return self._engine is not None and frontend_of(self._engine) is not None

    def library(self) -> Library:
        """What requests may use.

        Raises:
            EngineError: there is no engine yet.
            NotFound: it was started without cartridges.
        """
        from kvist.engines.vllm.intake import frontend_of

        if self._engine is None:
            raise EngineError("this server has no engine, or is still starting")
        frontend = frontend_of(self._engine)
        if frontend is None:
            raise NotFound(
                "this server was started without cartridges",
                hint="give vLLM a --kv-transfer-config with the connector CartridgeConnector of "
                "kvist.engines.vllm.cartridges",
            )
        return frontend.library

    async def stats(self) -> dict[str, Any]:
        """What the workers have done since they started, by rank.

        Raises:
            NotFound: as `library`.
        """
        self.library()
        assert self._engine is not None
        return await Core(self._engine).cartridge_stats()
