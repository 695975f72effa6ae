"""SGLang's tokenizer manager as kvist's calls go through it. Must not know the calls, nor import sglang itself."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any, Final

from kvist.engines.sglang.settings import Settings


class SglangEngine:
    """A `kvist.server.live.client.Engine`."""

    name: Final = "SGLang"

    def __init__(self, manager: Any, settings: Settings) -> None:
        """
        Args:
            manager: SGLang's tokenizer manager.
            settings: of this process.
        """
        from kvist.engines.sglang import messages

        self._manager, self._settings, self._messages = manager, settings, messages
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        messages.take_answers(manager, self._answered)

    @property
    def store(self) -> str:
        """The url of the store that it was given."""
        return self._settings.store

    def option(self, name: str) -> str | None:
        """What the settings say of an option that is text."""
        found: str | None = getattr(self._settings, name)
        return found

    def request_of(self, sequence: str) -> str:
        """The same: of a request's samples, the first is called as the request is."""
        return sequence

    async def call(self, op: str, payload: Mapping[str, Any]) -> Mapping[str, Any]:
        """The scheduler's answer to one call; a scheduler that died takes this process with it."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._messages.call(self._manager, number, op, dict(payload))
            said: Mapping[str, Any] = await answer
            return said
        finally:
            del self._waiting[number]

    def _answered(self, number: int, answer: Mapping[str, Any]) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():  # or whoever asked went away
            waiting.set_result(answer)

    async def pause(self) -> None:
        """Never asked for: a call finds SGLang between two steps."""

    async def resume(self) -> None:
        """Undo nothing."""

    async def is_paused(self) -> bool:
        """Never asked for."""
        return False
