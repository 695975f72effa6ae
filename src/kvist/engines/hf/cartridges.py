"""Cartridges on the embedded engine: their pages in host memory, and what a sequence says of the one it begins with.

Knows cartridges, layouts and residency. Must not know slots, sequences or turns.

A sequence that uses a cartridge has the cartridge's tokens as its first ones. Nobody computes them: the scheduler
copies their keys and values from here into slots, page by page, where the pool does not hold them already, and again
after the sequence gave up its pages. A whole page is found by its block hash and shared by all who use the cartridge;
the last, partly filled one is copied for each, for each writes on in it. Where the cartridge records its document's
token ids, these are the ids of the first tokens. Otherwise they have none, and `VIRTUAL`, which is in no vocabulary,
stands in their places.

*Isolation.* All block hashes of such a sequence are salted with the cartridge's identity, a digest of its content. So
no slot is found by a sequence that uses another cartridge or none, whatever the ids say; nor by one that uses an older
cartridge of the same name.

*Snapshots.* A sequence's state in a manifest has ``cartridge``: its ``id``, ``identity``, number of ``tokens``, and
whether it was ``placed`` before the prompt or the prompt repeated its document (`kvist.cartridge.placing`); its token
ids are all there are, `VIRTUAL` ones too, and its pages are all of its pages, the cartridge's too. So a checkout needs
neither the cartridge nor its registration: the sequence is restored under the same salt, shares what the engine holds
of the cartridge, and goes on from its pages. These are as good as the snapshot: who may write to the store that a
server checks out from is trusted with what later requests with that cartridge find in the pool, as with any prompt's
pages; only what is loaded from files is checked against the cartridge's manifest. An engine that does
not know ``cartridge`` refuses `VIRTUAL` ids.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.lease import Lease
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.placing import VIRTUAL, Prefix, PrefixMode, is_placed
from kvist.cartridge.reading import Loader
from kvist.cartridge.residency import Residency
from kvist.cartridge.room import ResidencyMetrics
from kvist.engines.hf.pool import DTYPES
from kvist.errors import AlreadyExists, InvalidCartridge, InvalidInput, LayoutMismatch, UnknownCartridge
from kvist.layout import Layout

if TYPE_CHECKING:
    from kvist.cartridge.library import Entry, Library

HOST_BYTES: Final = 4 * 1024**3
"""Default for the host memory that holds cartridges as pages."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Resident:
    """A cartridge in host memory.

    Attributes:
        pages: ``[pages, 2, layers, tokens a page, heads, head_dim]``, as slots hold them; zeros where no token is.
        token_ids: of its document, or ``None``.
    """

    pages: Tensor
    token_ids: tuple[int, ...] | None = None


class Hold:
    """A cartridge's pages, kept in host memory until `close`; for one live sequence."""

    def __init__(self, resident: Resident, lease: Lease[Resident] | None = None) -> None:
        self.resident = resident
        self._lease = lease

    @property
    def pages(self) -> Tensor:
        """See `Resident`."""
        return self.resident.pages

    def close(self) -> None:
        """Let go; may be called twice."""
        if self._lease is not None:
            self._lease.close()


@dataclass(frozen=True, slots=True)
class _Given:
    """A cartridge that was handed over as an object."""

    cartridge_id: str
    cartridge: Cartridge

    @property
    def manifest(self) -> CartridgeManifest:
        return self.cartridge.manifest


class Cartridges:
    """The cartridges that an engine's requests may name. Thread-safe.

    They come from `add`, and from ``library`` where one is set: it may change at any time, and is asked at each
    request. A cartridge is brought into host memory when a request names it, checked against its manifest as it is
    read, and goes, least recently used first, when it is in nobody's use.

    Attributes:
        library: where names are looked up that were not added; ``None``: nowhere.
    """

    def __init__(
        self, layout: Layout, model: Callable[[], ModelIdentity], vocab: int, *, host_bytes: int = HOST_BYTES
    ) -> None:
        """
        Args:
            layout: of the engine's pages.
            model: tells what a cartridge must be of; asked when the first one comes.
            vocab: ids of the model are below it.
            host_bytes: host memory for pages. Beside it are those of `carry`.
        """
        self.library: Library | None = None
        self._layout, self._model, self._vocab = layout, model, vocab
        self._lock = threading.Lock()
        self._given: dict[str, _Given] = {}
        self._residency = self._make_residency(host_bytes, verify=True)
        # Prefixes that came with a snapshot and that nobody has named here, as long as a sequence lives that uses them.
        self._carried: weakref.WeakValueDictionary[str, Resident] = weakref.WeakValueDictionary()

    def use(self, library: Library, *, model: ModelIdentity, host_bytes: int, verify: bool = True) -> None:
        """Take a library, and settings that go with it; before anything is loaded.

        Args:
            library: where names are looked up that were not added; borrowed.
            model: what a cartridge must be of, instead of what the engine calls its model.
            host_bytes: host memory for pages. Beside it are those of `carry`.
            verify: compare the checksum of what is loaded, and refuse numbers that are none.
        """
        self.library, self._model = library, lambda: model
        self._residency.close()
        self._residency = self._make_residency(host_bytes, verify)

    def _make_residency(self, host_bytes: int, verify: bool) -> Residency[Resident]:
        self._loader = Loader(verify=verify)
        return Residency(host_bytes, self._load, self._size_of, check=self._check)

    # -- names ---------------------------------------------------------------------------------------------------

    def add(self, cartridge: Cartridge, cartridge_id: str | None = None) -> str:
        """Let requests name ``cartridge``, and bring it into host memory.

        Args:
            cartridge: it must not be closed before it is removed, unless it has a directory.
            cartridge_id: default the one in its manifest.

        Returns:
            Its name.

        Raises:
            AlreadyExists: another has the name.
            LayoutMismatch: it is of another model or another dtype.
            DamagedCartridge, InvalidCartridge: its files are not what its manifest says.
            ResidencyFull: there is no room for it, now or ever.
        """
        name = cartridge.manifest.cartridge_id if cartridge_id is None else cartridge_id
        self._require_fit(cartridge.manifest)
        with self._lock:
            known = self._given.get(name)
            if known is not None and known.manifest.identity != cartridge.manifest.identity:
                raise AlreadyExists(f"a cartridge {name!r} is loaded already", hint="remove it first")
            if known is not None:
                return name
            self._given[name] = _Given(name, cartridge)
        try:
            self._residency.acquire(cartridge.manifest.identity).close()
        except BaseException:
            self.remove(name)
            raise
        return name

    def remove(self, cartridge_id: str) -> bool:
        """Let nobody name it any more; whether it was added. Sequences that use it go on."""
        with self._lock:
            return self._given.pop(cartridge_id, None) is not None

    def ids(self) -> list[str]:
        """Every name, sorted."""
        with self._lock:
            names = set(self._given)
        return sorted(names | set(self.library.ids() if self.library is not None else ()))

    def find(self, cartridge_id: str) -> _Given | Entry:
        """The cartridge of that name.

        Raises:
            UnknownCartridge: there is none.
            LayoutMismatch: it does not fit the model.
        """
        with self._lock:
            given = self._given.get(cartridge_id)
        if given is not None:
            return given
        if self.library is None:
            raise UnknownCartridge(f"no cartridge {cartridge_id!r:.200} is loaded")
        entry = self.library.get(cartridge_id)
        self._require_fit(entry.manifest)
        return entry

    def metrics(self) -> ResidencyMetrics:
        """Of the cartridges in host memory."""
        return self._residency.metrics()

    def close(self) -> None:
        """Give up what is in host memory."""
        self._residency.close()

    def size_of(self, manifest: CartridgeManifest) -> int:
        """Bytes of host memory that a cartridge takes."""
        return -(-manifest.num_tokens_raw // self._layout.page_size_tokens) * 2 * self._layout.page_bytes

    def preload(self, cartridge_id: str) -> bool:
        """Bring a cartridge into host memory before a request names it; ``False`` if there is no room.

        Raises:
            UnknownCartridge, LayoutMismatch: see `find`.
            DamagedCartridge, InvalidCartridge: its files are not what its manifest says.
        """
        return self._residency.prefetch(self.find(cartridge_id).manifest.identity)

    # -- pages ---------------------------------------------------------------------------------------------------

    def prefix(self, cartridge_id: str, prompt: Sequence[int], mode: PrefixMode = "auto") -> Prefix:
        """What a sequence over ``prompt`` begins with.

        Raises:
            InvalidInput: the mode is ``prompt``, and the prompt does not begin with the cartridge's document.
            UnknownCartridge, LayoutMismatch: see `find`.
            DamagedCartridge, InvalidCartridge, ResidencyFull: its token ids were needed, and cannot be had.
        """
        manifest = self.find(cartridge_id).manifest
        document: Sequence[int] | None = None
        may_repeat = manifest.has_token_ids and len(prompt) >= manifest.num_tokens_raw
        if mode == "prompt" and manifest.has_token_ids and not may_repeat:  # nothing need be loaded to see it
            raise InvalidInput(
                f"cartridge_prefix: the prompt must begin with the {manifest.num_tokens_raw} token ids of the "
                f"cartridge's document; it has {len(prompt)}"
            )
        if mode != "virtual" and may_repeat:
            with self._residency.acquire(manifest.identity) as lease:
                document = lease.value.token_ids
        placed = is_placed(mode, document, prompt)
        return Prefix(cartridge_id, manifest.identity, manifest.num_tokens_raw, placed)

    def hold(self, prefix: Prefix) -> Hold:
        """Its pages, brought into host memory if need be. May take long.

        Raises:
            UnknownCartridge: no cartridge with its identity is known, or it is not any more.
            DamagedCartridge, InvalidCartridge, ResidencyFull: it cannot be brought in.
        """
        lease = self._residency.acquire(prefix.identity)
        return Hold(lease.value, lease)

    def held(self, prefix: Prefix) -> Hold | None:
        """As `hold`, of what is in host memory; ``None`` if it would have to be brought in."""
        lease = self._residency.lease(prefix.identity)
        if lease is not None:  # it was checked; what came with a snapshot is as good as the snapshot
            return Hold(lease.value, lease)
        carried = self._carried.get(prefix.identity)
        return None if carried is None else Hold(carried)

    def carry(self, prefix: Prefix, pages: Tensor) -> Hold:
        """Hold a prefix by pages of a sequence that began with it, for as long as anybody holds it.

        They are host memory that ``host_bytes`` does not bound: as many prefixes at most as sequences are live.

        Args:
            prefix: of that sequence.
            pages: a copy of its first pages, the caller's no more; rows of other tokens may be anything.
        """
        fill = prefix.tokens % self._layout.page_size_tokens
        if fill:
            pages[-1, :, :, fill:] = 0
        resident = Resident(pages)
        self._carried[prefix.identity] = resident
        return Hold(resident)

    def ids_of(self, prefix: Prefix, hold: Hold) -> list[int]:
        """What stands before the prompt in the sequence's token ids."""
        if not prefix.placed:
            return []
        return list(hold.resident.token_ids or [VIRTUAL] * prefix.tokens)

    # -- what residency calls ------------------------------------------------------------------------------------

    def _source(self, identity: str) -> _Given | Entry:
        with self._lock:
            for given in self._given.values():
                if given.manifest.identity == identity:
                    return given
        entry = self.library.by_identity(identity) if self.library is not None else None
        if entry is None:
            raise UnknownCartridge(f"no cartridge of identity {identity} is known here, or it was removed just now")
        return entry

    def _size_of(self, identity: str) -> int:
        return self.size_of(self._source(identity).manifest)

    def _check(self, identity: str) -> None:
        """What can be seen before anything goes for it; what is wrong with the rest is seen while it is loaded."""
        found = self._place(identity)
        if isinstance(found, Cartridge):
            self._require_known(found.token_ids)
        else:
            with self._loader.open(found, identity) as reading:
                self._require_known(reading.token_ids)

    def _load(self, identity: str) -> Resident:
        found = self._place(identity)
        if isinstance(found, Cartridge):
            layers = ((number, *found.layer(number)) for number in range(found.num_layers))
            return Resident(pack(layers, found.num_tokens, self._layout), found.token_ids)
        with self._loader.open(found, identity) as reading:
            self._require_known(reading.token_ids)
            pages = pack(reading, reading.manifest.num_tokens_raw, self._layout)
        return Resident(pages, reading.token_ids)

    def _require_known(self, ids: Sequence[int] | None) -> None:
        wrong = next((one for one in ids or () if not 0 <= one < self._vocab), None)
        if wrong is not None:
            raise InvalidCartridge(f"the token ids of its document must be in [0, {self._vocab}), got {wrong}")

    def _place(self, identity: str) -> Path | Cartridge:
        """The directory that a cartridge is read from; one that has none is in memory."""
        source = self._source(identity)
        if isinstance(source, _Given):
            return source.cartridge.directory or source.cartridge
        return source.directory

    def _require_fit(self, manifest: CartridgeManifest) -> None:
        manifest.require(self._model())
        if manifest.first_position:
            raise LayoutMismatch(
                f"cartridge {manifest.cartridge_id!r} begins at position {manifest.first_position}, expected 0"
            )


def pack(layers: Iterable[tuple[int, Tensor, Tensor]], tokens: int, layout: Layout) -> Tensor:
    """Layers of a cartridge, by number, keys and values, as pages of ``layout``, whose shapes and dtype they have."""
    size = layout.page_size_tokens
    whole, fill = divmod(tokens, size)
    shape = (whole + bool(fill), 2, layout.n_layers, size, layout.n_heads, layout.head_dim)
    pages = torch.empty(shape, dtype=DTYPES[layout.dtype])
    if fill:
        pages[whole] = 0
    for number, *pair in layers:
        for half, rows in enumerate(pair):
            pages[:whole, half, number] = rows[: whole * size].reshape(whole, size, layout.n_heads, layout.head_dim)
            if fill:
                pages[whole, half, number, :fill] = rows[whole * size :]
    return pages
