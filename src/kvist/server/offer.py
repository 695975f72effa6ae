"""The offer: which cartridge a request uses.

Knows what requests say, the router, and the engine's cartridges by name. Must not know HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from kvist.cartridge.placing import Prefix, PrefixMode, parse_mode
from kvist.cartridge.routing import CartridgeRouter, ExplicitCartridgeRouter, Selection
from kvist.errors import UnknownCartridge
from kvist.server.schema import Transfer

if TYPE_CHECKING:
    from kvist.cartridge.config import CartridgeConfig
    from kvist.cartridge.library import Library
    from kvist.engines.hf import Engine

log = logging.getLogger("kvist.server")


class Offer:
    """The cartridges that an engine's requests may use, and how they choose.

    Attributes:
        library: asked for changes at every request; ``None``: only what the engine was given.
    """

    def __init__(
        self,
        engine: Engine,
        library: Library | None = None,
        router: CartridgeRouter | None = None,
        *,
        mode: PrefixMode = "auto",
        refuses_unknown: bool = True,
    ) -> None:
        """
        Args:
            engine: which has the library too (`kvist.engines.hf.cartridges.Cartridges.use`).
            library: of which the router tells ids.
            router: default: a request uses what it names.
            mode: of requests that say none.
            refuses_unknown: an unknown id is an error; else the request is computed without a cartridge.
        """
        self.library = library
        self._engine = engine
        self._router = router or ExplicitCartridgeRouter()
        self._mode = mode
        self._refuses_unknown = refuses_unknown

    def prefix(self, transfer: Transfer | None, ids: Sequence[int]) -> Prefix | None:
        """What a request over the prompt ``ids`` begins with; may read files.

        Raises:
            InvalidInput: a mode that is none, or that this prompt cannot be had in.
            UnknownCartridge: there is none of that id or label.
            KvistError: the cartridge cannot be used.
        """
        params = {} if transfer is None else msgspec.structs.asdict(transfer)
        mode = params.get("cartridge_prefix")
        mode = self._mode if mode is None else parse_mode(mode)
        if self.library is not None:
            self.library.refresh()
        try:
            cartridge_id = self._router.resolve(Selection(params))
            return None if cartridge_id is None else self._engine.cartridges.prefix(cartridge_id, ids, mode)
        except UnknownCartridge as error:
            if self._refuses_unknown:
                raise
            log.warning("computed without a cartridge: %s", error)
            return None


def open_offer(engine: Engine, config: CartridgeConfig) -> Offer:
    """Open what a configuration names, and let the engine's requests use it. The caller closes the offer's library.

    Raises:
        KvistError: whatever is wrong with a configured cartridge, the registry or the router.
    """
    from kvist.cartridge.config import open_library  # needs a database's client, and a server without cartridges none

    model = engine.model.identity
    library, router = open_library(config, model)
    try:
        configured = [library.get(name).manifest for name in library.ids()[: len(config.sources)]]
        largest = max(map(engine.cartridges.size_of, configured), default=0)
        engine.cartridges.use(
            library, model=config.served(model), host_bytes=config.capacity(largest), verify=config.verify
        )
        for cartridge_id in config.preload:
            engine.cartridges.preload(cartridge_id)
    except BaseException:
        library.close()
        raise
    return Offer(engine, library, router, mode=config.prefix, refuses_unknown=config.unknown == "refuse")
