"""SGLang's tokenizer manager as kvist's calls go through it. Knows what it can do (0.5.23); must not know the calls."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any, Final, Protocol

from kvist.engines.sglang.settings import Settings


class TokenizerManager(Protocol):
    """What of SGLang's tokenizer manager is used here."""

    _result_dispatcher: Any

    def auto_create_handle_loop(self) -> None:
        """Begin to receive, in the running event loop, if that has not begun."""

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        """Send a message."""


class SglangEngine:
    """A `kvist.server.live.client.Engine`."""

    name: Final = "SGLang"

    def __init__(self, manager: TokenizerManager, settings: Settings) -> None:
        from kvist.engines.sglang.messages import KvistReqOutput

        self._manager, self._settings = manager, settings
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        manager._result_dispatcher._mapping[KvistReqOutput] = self._answered

    @property
    def store(self) -> str:
        """The url of the store that it was given."""
        return self._settings.store

    def option(self, name: str) -> str | None:
        """What the settings say of an option that is text."""
        found: str | None = getattr(self._settings, name)
        return found

    async def call(self, op: str, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """The scheduler's answer to one call; a scheduler that died takes this process with it."""
        from kvist.engines.sglang.messages import KvistReqInput

        self._manager.auto_create_handle_loop()
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._manager._dispatch_to_scheduler(KvistReqInput(number=number, op=op, payload=dict(payload)))
            said: Mapping[str, Any] = await answer
            return said
        finally:
            del self._waiting[number]

    def _answered(self, message: Any) -> None:
        waiting = self._waiting.get(message.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(message.answer)

    async def pause(self) -> None:
        """Never asked for: a call finds SGLang between two steps."""

    async def resume(self) -> None:
        """Undo nothing."""

    async def is_paused(self) -> bool:
        """Never asked for."""
        return False
