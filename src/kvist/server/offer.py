"""The offer: which cartridge a request uses.

Knows what requests say, the router, and the engine's cartridges by name. Must not know HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvist.cartridge.placing import Prefix, PrefixMode, parse_mode
from kvist.cartridge.routing import ID_KEY, CartridgeRouter, ExplicitCartridgeRouter, Selection
from kvist.errors import CartridgeTooLarge, InvalidInput, ResidencyFull, UnknownCartridge
from kvist.server.errors import BadRequest
from kvist.server.schema import Transfer

if TYPE_CHECKING:
    from kvist.cartridge.config import CartridgeConfig
    from kvist.cartridge.library import Library
    from kvist.engines.hf import AnyEngine, Engine

log = logging.getLogger("kvist.server")


class Offer:
    """The cartridges that an engine's requests may use, and how they choose.

    Attributes:
        library: looked at for changes when a request uses a cartridge; ``None``: only what the engine was given.
    """

    def __init__(
        self,
        engine: AnyEngine,
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
        self._default = self._router.resolve(Selection())
        if library is not None:
            library.nudge()

    def lane(self, transfer: Transfer | None) -> Hashable | None:
        """The cartridge that a request may have to wait for, by whatever it says of it; ``None``: it uses none."""
        chosen = {} if transfer is None else transfer.chosen()
        return frozenset(chosen.items()) if chosen else self._default

    def prefix(self, transfer: Transfer | None, ids: Sequence[int]) -> Prefix | None:
        """What a request over the prompt ``ids`` begins with; may read files.

        Raises:
            InvalidInput: a mode that is none, or that this prompt cannot be had in; a field that nobody reads.
            UnknownCartridge: there is none of that id or label.
            KvistError: the cartridge cannot be used.
        """
        wanted = None if transfer is None else transfer.cartridge_prefix
        mode = self._mode if wanted is None else parse_mode(wanted)
        try:
            cartridge_id = self._choose({} if transfer is None else transfer.chosen())
            if cartridge_id is not None:
                return self._engine.cartridges.prefix(cartridge_id, ids, mode)
        except UnknownCartridge as error:
            if self._refuses_unknown:
                raise
            log.warning("computed without a cartridge: %s", error)
            return None
        if wanted is not None:
            param = "kv_transfer_params.cartridge_prefix"
            raise BadRequest(f"{param}: goes with a cartridge, and the request uses none", param=param)
        return None

    def _choose(self, chosen: Mapping[str, str | int]) -> str | None:
        """The id that the router comes to."""
        keys = self._router.keys
        for name in chosen:
            if name not in keys and name != ID_KEY:
                param = f"kv_transfer_params.{name}"[:200]
                goes_by = ", ".join(sorted(keys)) or "nothing that a request says"
                raise BadRequest(f"{param}: unknown field; this server's router goes by {goes_by}", param=param)
        if self.library is not None and (chosen or self._default is not None):
            self.library.nudge()
        try:
            return self._router.choose(Selection(chosen))
        except InvalidInput as error:
            raise BadRequest(str(error), param=f"kv_transfer_params.{ID_KEY}") from None
        except UnknownCartridge:  # a label of a cartridge that came just now
            if self.library is None or not self.library.refresh():
                raise
            return self._router.choose(Selection(chosen))


def open_offer(engine: Engine, config: CartridgeConfig) -> Offer:
    """Open what a configuration names, and let the engine's requests use it. The caller closes the offer's library.

    Raises:
        CartridgeTooLarge, ResidencyFull: the configured memory does not hold a configured cartridge, or not all that
            are to be preloaded.
        KvistError: whatever else is wrong with a configured cartridge, the registry or the router.
    """
    from kvist.cartridge.config import open_library  # needs a database's client, and a server without cartridges none

    model = engine.model.identity
    library, router = open_library(config, model)
    try:
        configured = [library.get(name).manifest for name in library.ids()[: len(config.sources)]]
        largest = max(map(engine.cartridges.size_of, configured), default=0)
        capacity = config.capacity(largest)
        if capacity < largest:
            raise CartridgeTooLarge(
                f"the largest configured cartridge takes {largest} bytes, and host_bytes is {capacity}",
                hint=f"host_bytes of at least {largest}",
            )
        preloaded = {library.get(name).manifest.identity: library.get(name).manifest for name in config.preload}
        together = sum(map(engine.cartridges.size_of, preloaded.values()))
        if capacity < together:
            raise ResidencyFull(
                f"all that is to be preloaded takes {together} bytes, and host_bytes is {capacity}",
                hint=f"host_bytes of at least {together}, or preload fewer",
            )
        engine.cartridges.use(library, model=config.served(model), host_bytes=capacity, verify=config.verify)
        for cartridge_id in config.preload:
            engine.cartridges.preload(cartridge_id)
    except BaseException:
        library.close()
        raise
    return Offer(engine, library, router, mode=config.prefix, refuses_unknown=config.unknown == "refuse")
