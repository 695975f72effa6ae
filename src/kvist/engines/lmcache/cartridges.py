"""Cartridges as LMCache's chunks: which part of a cartridge a key names, and its bytes.

Knows a `Library`, tensors, and how LMCache hashes token ids (as a function). Imports no LMCache.

A request that uses a cartridge carries the config ``lmcache.tag.cartridge``, whose value is in all its keys. Its prompt
begins with the document, so its chunks are found by hash, as always; they are read from the cartridge. That is for
cartridges that know their document only: what LMCache cannot load it computes, and computed placeholders are no
trained cartridge. Such a one can be had by layer, with ``lmcache.tag.layer`` besides, by whoever knows what to do
with it; and serving it is the work of the vLLM connector.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.library import Entry, Library
from kvist.cartridge.manifest import CartridgeManifest
from kvist.engines.lmcache.geometry import Geometry
from kvist.engines.lmcache.host import Hasher
from kvist.engines.lmcache.keys import CartridgeTags, ChunkKey
from kvist.errors import InvalidInput, KvistError, LayoutMismatch, UnknownCartridge
from kvist.pager.sharding import rank_heads

log = logging.getLogger("kvist.lmcache")

_DTYPES: Final = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a cartridge.

    Attributes:
        entry: the cartridge.
        start, end: its tokens.
        layer: of one layer; ``None``: of all.
    """

    entry: Entry
    start: int
    end: int
    layer: int | None = None

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.end - self.start


class CartridgeChunks:
    """The cartridges that fit one worker. Thread-safe.

    Each is verified when it is first read, and stays mapped. One that is damaged is a miss from then on; so is one
    that does not fit, or that there is not.
    """

    def __init__(
        self,
        library: Library,
        geometry: Geometry,
        num_layers: int,
        hasher: Hasher,
        *,
        refresh_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read nothing yet.

        Args:
            library: of cartridges for any model; closed by `close`.
            geometry: of the worker's chunks.
            num_layers: of the model; a chunk of one layer does not say.
            hasher: see `Hasher`.
            refresh_s: the registry is asked what came or left at most so often.
            clock: seconds.
        """
        self._refresh_s, self._clock, self._refreshed = refresh_s, clock, clock()
        self._library, self._geometry, self._num_layers, self._hasher = library, geometry, num_layers, hasher
        self._lock: Final = threading.Lock()
        self._open: dict[str, Cartridge] = {}
        self._refused: dict[str, str] = {}  # identity to why
        self._parts: dict[str, Mapping[int | bytes, tuple[int, int]]] = {}

    def identity(self, cartridge_id: str) -> str | None:
        """Of the cartridge that the id stands for now; ``None``: there is none that can be used."""
        entry = self._entry(cartridge_id)
        return None if entry is None else entry.manifest.identity

    def find(self, tags: CartridgeTags, key: ChunkKey) -> Part | None:
        """The part of a cartridge that a key names; ``None``: it is of the tokens behind it, or there is none."""
        entry = self._entry(tags.cartridge_id)
        if entry is None:
            return None
        if tags.layer is not None:
            is_there = tags.layer < self._num_layers
            return Part(entry, 0, entry.manifest.num_tokens_raw, tags.layer) if is_there else None
        found = self._chunks(entry).get(key.chunk_hash)
        if found is None:
            return None
        layer = getattr(key, "layer_id", None)
        return Part(entry, *found, layer=layer) if (layer is not None) == self._geometry.is_of_a_layer else None

    def fill(self, part: Part, halves: tuple[Tensor, Tensor]) -> bool:
        """Copy a part to where it is wanted; whether it could be had.

        Args:
            part: from `find`.
            halves: K and V, each ``[layers of the part, tokens, heads * head_dim]`` of this worker.
        """
        try:
            cartridge = self._opened(part.entry)
        except KvistError as error:
            self._refuse(part.entry, str(error))
            return False
        layout = self._geometry.layout
        heads = rank_heads(cartridge.manifest.num_kv_heads, layout.tp_size, layout.tp_rank)
        layers = range(self._num_layers) if part.layer is None else [part.layer]
        for place, layer in enumerate(layers):
            for half, tensor in zip(halves, cartridge.layer(layer), strict=True):
                half[place].copy_(tensor[part.start : part.end, heads.start : heads.stop].flatten(1))
        return True

    def close(self) -> None:
        """Let go of the cartridges and the registry. What was copied stays."""
        with self._lock:
            for cartridge in self._open.values():
                cartridge.close()
            self._open.clear()
        self._library.close()

    # -- one cartridge -------------------------------------------------------------------------------------------

    def _entry(self, cartridge_id: str) -> Entry | None:
        if self._clock() - self._refreshed >= self._refresh_s:
            self._refreshed = self._clock()
            self._library.refresh()
        try:
            entry = self._library.get(cartridge_id)
        except UnknownCartridge:
            return None
        except KvistError as error:
            log.warning("cartridge %s cannot be used: %s", cartridge_id, error)
            return None
        if entry.manifest.identity in self._refused:
            return None
        wrong = self._mismatches(entry.manifest)
        if wrong:
            self._refuse(entry, "; ".join(wrong))
            return None
        return entry

    def _mismatches(self, manifest: CartridgeManifest) -> list[str]:
        """One line for each thing that makes a cartridge useless here."""
        layout = self._geometry.layout
        dtype = _DTYPES.get(layout.dtype, layout.dtype)
        pairs = [
            ("model", manifest.model_id.rpartition("/")[2], str(layout.model).rstrip("/").rpartition("/")[2]),
            ("layers", manifest.num_layers, self._num_layers),
            ("head_dim", manifest.head_dim, layout.head_dim),
            ("dtype", manifest.dtype, dtype),
            ("attention", "full", layout.attention),
            ("first position", manifest.first_position, 0),
        ]
        if manifest.model_revision is not None and layout.revision is not None:
            pairs.append(("revision", manifest.model_revision, layout.revision))
        try:
            heads = len(rank_heads(manifest.num_kv_heads, layout.tp_size, layout.tp_rank))
            pairs.append(("KV heads of a worker", heads, layout.n_heads))
        except InvalidInput as error:
            return [str(error)]
        return [f"{what} {there!r} there, {here!r} here" for what, there, here in pairs if there != here]

    def _chunks(self, entry: Entry) -> Mapping[int | bytes, tuple[int, int]]:
        """Tokens of each chunk, by its hash; of none, if the cartridge does not know its document."""
        identity = entry.manifest.identity
        with self._lock:
            known = self._parts.get(identity)
        if known is not None:
            return known
        parts: dict[int | bytes, tuple[int, int]] = {}
        if entry.manifest.has_token_ids:
            try:
                ids = self._opened(entry).token_ids or ()
                parts = {chunk: (start, end) for start, end, chunk in self._hasher(ids)}
            except KvistError as error:
                self._refuse(entry, str(error))
        else:
            log.warning("cartridge %s does not know its token ids: it can only be had by layer", entry.cartridge_id)
        with self._lock:
            return self._parts.setdefault(identity, parts)

    def _opened(self, entry: Entry) -> Cartridge:
        """The cartridge, mapped; the first time it is read and verified, while others wait."""
        identity = entry.manifest.identity
        with self._lock:
            found = self._open.get(identity)
            if found is None:
                found = Cartridge.from_pretrained(entry.directory, verify=True)
                if found.identity != identity:
                    raise LayoutMismatch(f"{entry.directory} holds {found.identity}, its manifest said {identity}")
                self._open[identity] = found
            return found

    def _refuse(self, entry: Entry, why: str) -> None:
        with self._lock:
            is_news = self._refused.setdefault(entry.manifest.identity, why) is why
        if is_news:
            log.error("cartridge %s cannot be used: %s", entry.cartridge_id, why)
