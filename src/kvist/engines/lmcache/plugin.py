"""The storage plugin that LMCache 0.5.6 loads: its keys and memory objects on one side, `Chunks` on the other.

In an LMCache configuration::

    storage_plugins: [kvist]
    extra_config:
      storage_plugin.kvist.module_path: kvist.engines.lmcache
      storage_plugin.kvist.class_name: KvistStorage
      storage_plugin.kvist.store: file:///srv/kv

Further options: `kvist.engines.lmcache.settings.Settings`. LMCache's keys hold 64 bits of a hash: take
``pre_caching_hash_algorithm: sha256_cbor``, since Python's own hash, its default, is the same in two processes only by
chance (``PYTHONHASHSEED``).

This is the interface of LMCache inside the engine's process, ``StoragePluginInterface``, the same since 0.3.13.
Its separate server (``lmcache.v1.multiprocess``) has another one, which is not spoken here. Without LMCache this module
can be imported, and the class be made by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from kvist.cartridge.config import CartridgeConfig, open_library
from kvist.engines.lmcache.cartridges import CartridgeChunks, Part
from kvist.engines.lmcache.geometry import Geometry, views
from kvist.engines.lmcache.host import StoragePluginInterface, hasher, memory_format
from kvist.engines.lmcache.keys import block_of, cartridge_of
from kvist.engines.lmcache.settings import Settings
from kvist.engines.paged.chunks import Chunks
from kvist.errors import DamagedPage, InvalidInput, LayoutMismatch
from kvist.hashing import Buffer, weights

log = logging.getLogger("kvist.lmcache")

_LAYERWISE_LOOKUP: Final = "fake_lookup_id"
"""What LMCache 0.5.6 calls the lookup of a layerwise retrieval, which cannot be told that a chunk is missing."""


class KvistStorage(StoragePluginInterface):
    """LMCache's chunks in a kvist repository: durable, bounded, content-addressed, verified when they are read.

    Attributes:
        settings: what the configuration says.
        chunks: the store. Its metrics tell what happened.
        cartridges: chunks of cartridges; ``None``: none are configured.
    """

    def __init__(
        self,
        dst_device: str = "cpu",
        config: Any = None,
        metadata: Any = None,
        local_cpu_backend: Any = None,
        loop: Any = None,
    ) -> None:
        """Called by LMCache; an error makes it log that and go on without this backend.

        Args:
            dst_device: device of the engine; chunks are in host memory all the same.
            config, metadata: LMCache's ``LMCacheEngineConfig`` and ``LMCacheMetadata``.
            local_cpu_backend: allocates what is read; ``None`` in a scheduler, which only looks up.
            loop: LMCache's event loop.

        Raises:
            InvalidInput: no configuration, or one that cannot be right.
            UnsupportedModel: a KV cache that cannot be paged.
            KvistError: the repository, or a cartridge, cannot be opened.
        """
        super().__init__(dst_device, config, metadata, local_cpu_backend, loop)
        if config is None or metadata is None:
            raise InvalidInput("KvistStorage needs LMCache's config and metadata")
        self.settings: Final = Settings.of_config(config.extra_config, config.storage_plugins, type(self))
        self.geometry: Final = _geometry(config, metadata, self.settings.revision)
        self.chunks: Final = self._open_chunks()
        try:
            self.cartridges: Final = self._open_cartridges()
        except BaseException:
            self.chunks.close()
            raise
        self._warned: set[str] = set()
        self._readers: Final = ThreadPoolExecutor(1, thread_name_prefix="kvist-lmcache-read")

    def __str__(self) -> str:
        return type(self).__name__

    # -- lookups -------------------------------------------------------------------------------------------------

    def contains(self, key: Any, pin: bool = False) -> bool:
        """Whether a chunk can be had; with ``pin``, it is kept from eviction until `unpin`."""
        if self._part(key) is not None:
            return True
        stored = self._stored_block(key)
        if stored is not None and pin:
            self.chunks.pins.pin((0, stored[0]))
        return stored is not None

    def batched_contains(self, keys: list[Any], pin: bool = False) -> int:
        """How many leading chunks can be had."""
        for count, key in enumerate(keys):
            if not self.contains(key, pin):
                return count
        return len(keys)

    async def batched_async_contains(self, lookup_id: str, keys: list[Any], pin: bool = False) -> int:
        """See `batched_contains`."""
        return self.batched_contains(keys, pin)

    def exists_in_put_tasks(self, key: Any) -> bool:
        """Whether a chunk was put and is not durable yet."""
        return any(self.chunks.is_waiting(block) for block in self._blocks(key))

    def pin(self, key: Any) -> bool:
        """Keep a chunk from eviction; whether it can be had. A cartridge's is never evicted."""
        return self.contains(key, pin=True)

    def unpin(self, key: Any) -> bool:
        """Take one pin back; whether the chunk can be had."""
        for block in self._blocks(key):
            self.chunks.pins.unpin((0, block))
        return self.contains(key)

    def touch_cache(self) -> None:
        """Nothing: what is read counts as used."""

    # -- writing -------------------------------------------------------------------------------------------------

    def batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: list[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> list[Future[int]] | None:
        """Take chunks in, to be committed by another thread; those that cannot be kept are passed over.

        They are copied before it returns. LMCache frees the memory of its chunks when it closes, and closes its
        allocator before its plugins; and while it runs, that memory is dearer than a copy.
        """
        wanted: dict[str, tuple[Any, Any]] = {}
        for key, chunk in zip(keys, objs, strict=True):
            block = self._block_to_put(key, chunk)
            if block is not None:
                wanted.setdefault(block, (key, chunk))
        if not wanted:
            return None
        pairs = list(wanted.values())

        def copy(index: int) -> tuple[Buffer, Buffer]:
            page = self.geometry.new_page()
            self.geometry.fill_page(page, pairs[index][1].tensor)
            return views(page)

        def done(block: str) -> None:
            if on_complete_callback is not None:
                on_complete_callback(wanted[block][0])

        return [self.chunks.put(list(wanted), copy, done)]

    async def async_batched_submit_put_task(
        self,
        keys: Sequence[Any],
        objs: list[Any],
        transfer_spec: Any = None,
        on_complete_callback: Callable[[Any], None] | None = None,
    ) -> None:
        """See `batched_submit_put_task`."""
        self.batched_submit_put_task(keys, objs, transfer_spec, on_complete_callback)

    def remove(self, key: Any, force: bool = True) -> bool:
        """Forget a chunk; with ``force``, also one that is pinned. Whoever reads it now reads on.

        A cartridge is not removed by removing what was read of it: `kvist cartridge remove` does that.
        """
        return sum(self.chunks.remove(block, force=force) for block in self._blocks(key)) > 0

    def clear(self) -> int:
        """Forget all chunks that are not pinned; how many tokens they had room for."""
        return self.chunks.clear() * self.geometry.layout.page_size_tokens

    # -- reading -------------------------------------------------------------------------------------------------

    def get_blocking(self, key: Any) -> Any:
        """A chunk as a memory object, the caller's from now on; ``None``: it cannot be had."""
        return self.batched_get_blocking([key])[0]

    def batched_get_blocking(self, keys: list[Any]) -> list[Any]:
        """The chunks in the order of the keys, ``None`` for those that cannot be had."""
        return self._get(keys, busy_loop=True)

    async def batched_get_non_blocking(self, lookup_id: str, keys: list[Any], transfer_spec: Any = None) -> list[Any]:
        """The leading chunks that can be had.

        Raises:
            DamagedPage: a chunk of a layerwise retrieval cannot be had. LMCache has then already promised its tokens,
                and would take the next chunk for it.
        """
        if self.loop is None:
            found = self._get(keys, busy_loop=False)
        else:
            found = await self.loop.run_in_executor(self._readers, lambda: self._get(keys, busy_loop=False))
        leading = found.index(None) if None in found else len(found)
        for chunk in found[leading:]:
            if chunk is not None:
                chunk.ref_count_down()
        if lookup_id == _LAYERWISE_LOOKUP and leading < len(keys):
            for chunk in found[:leading]:
                chunk.ref_count_down()
            raise DamagedPage(f"expected {len(keys)} chunks of a layer, of which the lookup found all, got {leading}")
        if lookup_id != _LAYERWISE_LOOKUP:  # the pins of its lookup: nobody else takes them back
            for key in keys:
                self.unpin(key)
        return found[:leading]

    def get_allocator_backend(self) -> Any:
        """LMCache's host memory."""
        return self.local_cpu_backend

    def close(self) -> None:
        """Make durable what was put, and stop. Idempotent."""
        self._readers.shutdown()
        self.chunks.close()
        if self.cartridges is not None:
            self.cartridges.close()

    def _get(self, keys: Sequence[Any], *, busy_loop: bool) -> list[Any]:
        if self.local_cpu_backend is None:
            return [None] * len(keys)
        found: list[Any] = [None] * len(keys)
        reads: list[_Read] = []
        for index, key in enumerate(keys):
            part = self._part(key)
            if part is not None:
                found[index] = self._get_part(part, busy_loop)
            elif (stored := self._stored_block(key)) is not None and (read := self._prepare(index, *stored, busy_loop)):
                reads.append(read)
        done = self.chunks.read([read.block for read in reads], [views(read.page) for read in reads])
        for read, is_read in zip(reads, done, strict=True):
            found[read.index] = self._finish(read, is_read, busy_loop)
        return found

    def _prepare(self, index: int, block: str, is_full: bool, busy_loop: bool) -> _Read | None:
        """Memory to read a stored chunk into: where LMCache wants it, if the chunk is a page as it lies."""
        if not is_full:  # how many tokens it has, its page says
            return _Read(index, block, None, self.geometry.new_page())
        chunk = self._allocate(self.geometry.layout.page_size_tokens, busy_loop)
        if chunk is None:
            return None
        return _Read(
            index, block, chunk, chunk.tensor if self.geometry.can_be_read_in_place else self.geometry.new_page()
        )

    def _finish(self, read: _Read, is_read: bool, busy_loop: bool) -> Any:
        chunk = read.chunk
        if not is_read:
            if chunk is not None:
                chunk.ref_count_down()
            return None
        if chunk is None:
            chunk = self._allocate(self.geometry.fill_of(read.page), busy_loop)
            if chunk is None:
                return None
        elif self.geometry.can_be_read_in_place:
            return chunk
        self.geometry.fill_chunk(chunk.tensor, read.page)
        return chunk

    def _get_part(self, part: Part, busy_loop: bool) -> Any:
        assert self.cartridges is not None
        geometry = self.geometry.by_layer() if part.layer is not None else self.geometry
        chunk = self._allocate(part.tokens, busy_loop, geometry)
        if chunk is not None and not self.cartridges.fill(part, geometry.halves(chunk.tensor)):
            chunk.ref_count_down()
            return None
        return chunk

    def _allocate(self, tokens: int, busy_loop: bool, geometry: Geometry | None = None) -> Any:
        geometry = geometry or self.geometry
        return self.local_cpu_backend.allocate(
            geometry.shape(tokens), geometry.dtype, memory_format(geometry.format), busy_loop=busy_loop
        )

    # -- keys ----------------------------------------------------------------------------------------------------

    def _blocks(self, key: Any) -> tuple[str, ...]:
        """Names under which a chunk may be stored, full and not; none, if what the key names is not to be had."""
        try:
            tags = cartridge_of(key)
        except ValueError as error:
            self._warn_once(str(error))
            return ()
        identity = ""
        if tags is not None:
            found = (
                None
                if self.cartridges is None or tags.layer is not None
                else self.cartridges.identity(tags.cartridge_id)
            )
            if found is None:
                return ()
            identity = found
        return tuple(block_of(key, identity=identity, is_full=is_full) for is_full in (True, False))

    def _stored_block(self, key: Any) -> tuple[str, bool] | None:
        """The name under which a chunk is stored, and whether it is a full one."""
        for block, is_full in zip(self._blocks(key), (True, False), strict=False):
            if block in self.chunks:
                return block, is_full
        return None

    def _part(self, key: Any) -> Part | None:
        if self.cartridges is None:
            return None
        try:
            tags = cartridge_of(key)
        except ValueError:
            return None
        return None if tags is None else self.cartridges.find(tags, key)

    def _block_to_put(self, key: Any, chunk: Any) -> str | None:
        """The name under which a chunk is to be stored; ``None``: it cannot be, or is a cartridge's own."""
        blocks = self._blocks(key)
        if not blocks or self._part(key) is not None:
            return None
        try:
            if len(chunk.get_shapes()) != 1:
                raise LayoutMismatch(f"expected chunks of one tensor, got one of {len(chunk.get_shapes())}")
            tokens = self.geometry.tokens(chunk.get_shape(), chunk.get_dtype())
        except LayoutMismatch as error:
            self._warn_once(f"chunks are not stored: {error}")
            return None
        return blocks[0] if tokens == self.geometry.layout.page_size_tokens else blocks[1]

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    # -- making --------------------------------------------------------------------------------------------------

    def _open_chunks(self) -> Chunks:
        return self.settings.open(
            self.geometry.layout, pin_timeout_s=float(self.config.pin_timeout_sec), name="lmcache"
        )

    def _open_cartridges(self) -> CartridgeChunks | None:
        if not self.settings.cartridges:
            return None
        if self.config.enable_blending:
            raise InvalidInput("cartridges cannot be had with blending: its chunks are no prefixes")
        library = open_library(CartridgeConfig.from_extra(self.settings.cartridges), None).library
        return CartridgeChunks(
            library,
            self.geometry,
            self.metadata.kv_shape[0],
            hasher(self.config, self.metadata),
            refresh_s=self.settings.refresh_s,
        )


@dataclass(frozen=True, slots=True)
class _Read:
    """A chunk to read: which of those that were asked for, LMCache's memory for it if its size is known, and a page."""

    index: int
    block: str
    chunk: Any
    page: Tensor


def _geometry(config: Any, metadata: Any, revision: str | None) -> Geometry:
    layers, parts, _, heads, dim = metadata.kv_shape
    directory = Path(metadata.model_name)
    if revision is None and (directory / "config.json").is_file():
        revision = weights.revision(directory)
    return Geometry.of(
        (layers, parts, config.chunk_size, heads, dim),
        metadata.kv_dtype,
        model=metadata.model_name,
        revision=revision,
        world_size=metadata.world_size,
        worker_id=metadata.worker_id,
        use_mla=metadata.use_mla,
        use_layerwise=config.use_layerwise,
        enable_blending=config.enable_blending,
    )
