"""The token ids of cartridges' documents, and what stands for a cartridge before a prompt. Knows cartridges' files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from kvist.cartridge.cartridge import Cartridge
from kvist.engines.vllm.cartridges.placing import Placement
from kvist.errors import DamagedCartridge

_KEPT: Final = 64
"""Cartridges whose token ids are kept."""


class TokenIds:
    """The token ids of cartridges that have them, by identity; read once and kept. Thread-safe."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[int, ...] | None] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, identity: str, directory: str | Path) -> tuple[int, ...] | None:
        """The ids of the document, or ``None``: the cartridge does not say, or was trained.

        Raises:
            DamagedCartridge: the directory holds another cartridge by now.
            KvistError: it holds none.
        """
        with self._lock:
            if identity in self._kept:
                self._kept.move_to_end(identity)
                return self._kept[identity]
        with Cartridge.from_pretrained(directory, verify=False) as cartridge:
            if cartridge.identity != identity:
                raise DamagedCartridge(f"{directory}: expected the cartridge {identity}, got {cartridge.identity}")
            ids = cartridge.token_ids
        with self._lock:
            self._kept[identity] = ids
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return ids


class Prefixes:
    """In the engine core: the token ids that stand for a request's cartridge. Thread-safe."""

    def __init__(self) -> None:
        self._token_ids = TokenIds()

    def of(self, params: Mapping[str, Any], placeholder: int) -> tuple[list[int], int]:
        """The ids to put before a request's prompt, by its ``kv_transfer_params``, and how many of the prompt to skip.

        No ids: nothing is placed.

        Its document's where the cartridge has them, so that what looks at a prompt's tokens (a penalty, a
        recomputation) sees the text. Otherwise the placeholder: nothing is ever computed from it.

        Raises:
            DamagedCartridge: the directory holds another cartridge by now.
            KvistError: it holds none.
        """
        placement = Placement.of(params)
        if placement is None or not placement.placed:
            return [], 0
        ids = self._token_ids.of(placement.identity, placement.directory)
        return [placeholder] * placement.tokens if ids is None else list(ids), placement.skips
