"""The storage backend that HiCache of SGLang 0.5.23 loads: its page hashes and host pool here, `Chunks` there.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
      "backend_name": "kvist", "module_path": "kvist.engines.sglang.hicache", "class_name": "KvistHiCache",
      "interface_v1": 1, "store": "file:///srv/kv"}'

Further options: `kvist.engines.sglang.hicache_settings.Settings`. Without SGLang this module can be imported, and the
class be made by hand.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from blake3 import blake3
from torch import Tensor

from kvist.engines.paged.chunks import Chunks
from kvist.engines.sglang.hicache_host import HiCacheStorage, kv_cache_dtype, pinned, storage_metrics
from kvist.engines.sglang.hicache_pages import HostPages, views
from kvist.engines.sglang.hicache_settings import Settings
from kvist.errors import InvalidInput, KvistError, UnsupportedModel
from kvist.hashing import Buffer
from kvist.repo.manifest import canonical_json

log = logging.getLogger("kvist.hicache")

_KV: Final = "kv"
"""SGLang's name of the pool that holds the KV itself."""


class KvistHiCache(HiCacheStorage):
    """HiCache's pages in a kvist repository: durable, bounded, content-addressed, verified when they are read.

    What a write says is stored is durable when it returns. A page that cannot be read, or not stored, is a miss, and
    logged: no call fails because of the store.

    SGLang writes from one thread and reads from two others; all calls are safe from any.

    Attributes:
        settings: what the configuration says.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        """Called by SGLang; an error ends the server's start, or the request to attach, with its text.

        Args:
            storage_config: SGLang's ``HiCacheStorageConfig``.
            kwargs: further ones of its factory; there are none.

        Raises:
            InvalidInput: options that cannot be right.
            UnsupportedModel: a way to share pages among ranks that is not known.
        """
        self.settings: Final = Settings.of_config(storage_config.extra_config)
        if storage_config.tp_lcm_size is not None or storage_config.should_split_heads:
            raise UnsupportedModel(f"tp_lcm_size {storage_config.tp_lcm_size}: pages split by heads are not stored")
        if storage_config.dcp_size != 1:
            raise UnsupportedModel(f"dcp_size {storage_config.dcp_size}: pages shared by ranks are not stored")
        self._config: Final = storage_config
        self._pages: HostPages | None = None
        self._chunks: Chunks | None = None
        self._read: list[tuple[int, float]] = []
        self._stored: list[tuple[int, float]] = []

    @property
    def chunks(self) -> Chunks:
        """The store. Its metrics tell what happened.

        Raises:
            InvalidInput: no host pool is registered.
        """
        if self._chunks is None:
            raise InvalidInput("expected a host pool to be registered before pages are asked for, got none")
        return self._chunks

    @property
    def pages(self) -> HostPages:
        """Those of the host pool.

        Raises:
            InvalidInput: no host pool is registered.
        """
        if self._pages is None:
            raise InvalidInput("expected a host pool to be registered before pages are asked for, got none")
        return self._pages

    # -- the host pool -------------------------------------------------------------------------------------------

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the pool whose pages are stored, and open the repository.

        Raises:
            UnsupportedModel: a pool that cannot be paged, or weights that nothing pins.
            LayoutMismatch: another pool is registered, with other pages.
            KvistError: the repository cannot be opened or read.
        """
        config = self._config
        pages = HostPages.of(
            mem_pool_host,
            model=config.model_name,
            revision=pinned(config.model_name, self.settings.revision),
            # every rank holds all of a latent vector, and rank 0 writes it
            tp_rank=0 if config.is_mla_model else config.tp_rank,
            tp_size=config.tp_size,
            kv_cache_dtype=kv_cache_dtype(),
        )
        if self._pages is not None:
            self._pages.layout.require(pages.layout, of="a host pool", into="the one that is registered")
        else:
            page_bytes = 2 * pages.layout.page_bytes
            if self.settings.staging_bytes < page_bytes:
                raise InvalidInput(
                    f"a page has {page_bytes} bytes, so staging_bytes cannot be {self.settings.staging_bytes}"
                )
            self._chunks = self.settings.open(pages.layout, waits_for_refresh=True, name="hicache")
            log.info("kvist: HiCache finds %d pages of %d bytes", len(self._chunks), page_bytes)
        self._pages = pages
        super().register_mem_pool_host(mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Refuse every pool but that of the KV, which `register_mem_pool_host` has taken.

        Raises:
            UnsupportedModel: a pool of another name: a model with layers of several kinds, or a draft model.
        """
        name = str(getattr(host_pool_name, "value", host_pool_name))
        if name != _KV:
            raise UnsupportedModel(f"expected a model whose host pool is {_KV} alone, got a pool {name} besides")

    # -- lookups -------------------------------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        """Whether a page can be had."""
        return self._block(key) in self.chunks

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many leading pages can be had. A miss makes the repository be asked what others have stored."""
        for count, key in enumerate(keys):
            if not self.exists(key):
                return count
        return len(keys)

    # -- writing -------------------------------------------------------------------------------------------------

    def batch_set_v1(self, keys: list[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:
        """Store pages of the host pool; which of them are durable now.

        Args:
            keys: SGLang's hashes of the pages, in the order of a prompt.
            host_indices: slots of all their tokens. The pages must not change before this returns.
        """
        return self._set(keys, self._at(keys, host_indices))

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store pages given as tensors in the host pool's order; whether all of them are durable now."""
        return all(self._set(keys, list(values)))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store one page; see `batch_set`."""
        return self.batch_set([key], [value])

    def clear(self) -> bool:
        """Forget all pages of this layout, in the repository too: for every server that shares them.

        Returns:
            Whether none is left. If the store fails, this server forgets them, and others may find them still.
        """
        self.chunks.flush()  # learns of what others have stored
        self.chunks.clear()
        return self.chunks.flush() and len(self.chunks) == 0

    # -- reading -------------------------------------------------------------------------------------------------

    def batch_get_v1(self, keys: list[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:
        """Read pages into the host pool, verified; which of them were read. Where one was not, its slots are undefined.

        Args:
            keys: SGLang's hashes of the pages.
            host_indices: slots of all their tokens.
        """
        return self._get(keys, self._at(keys, host_indices))

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Tensor | None]:
        """Read pages into tensors in the host pool's order, verified.

        Args:
            keys: SGLang's hashes of the pages.
            target_locations: one for each, overwritten; new ones where there are none.

        Returns:
            These tensors; ``None`` for pages that cannot be had.
        """
        if target_locations is None:
            target_locations = [self.pages.pool.get_dummy_flat_data_page() for _ in keys]
        done = self._get(keys, target_locations)
        return [page if is_read else None for page, is_read in zip(target_locations, done, strict=True)]

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Tensor | None:
        """Read one page; see `batch_get`."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    # -- the rest ------------------------------------------------------------------------------------------------

    def get_stats(self) -> Any:
        """Pages and speed of the reads and writes since the last call, as SGLang's metrics want them."""
        read, self._read = self._read, []
        stored, self._stored = self._stored, []
        return storage_metrics(read, stored)

    def close(self) -> None:
        """Stop, and close the repository. Idempotent."""
        if self._chunks is not None:
            self._chunks.close()

    def _at(self, keys: Sequence[str], host_indices: Tensor) -> list[Tensor]:
        size = self.pages.pool.page_size
        if host_indices.numel() != len(keys) * size:
            raise InvalidInput(f"expected {size} slots for each of {len(keys)} pages, got {host_indices.numel()}")
        return [self.pages.at(index) for index in host_indices[::size].tolist()]

    def _set(self, keys: Sequence[str], pages: Sequence[Tensor]) -> list[bool]:
        began = time.perf_counter()
        blocks = [self._block(key) for key in keys]
        halves = [self.pages.halves(page) for page in pages]
        step = self.settings.staging_bytes // (2 * self.pages.layout.page_bytes)
        for start in range(0, len(blocks), step):

            def copy(index: int, start: int = start) -> tuple[Buffer, Buffer]:
                k, v = halves[start + index]
                return views((k.contiguous(), v.contiguous()))

            try:
                self.chunks.put(blocks[start : start + step], copy).result()
            except KvistError:  # logged where it happened
                break
        done = [block in self.chunks for block in blocks]
        self._note(self._stored, sum(done), began)
        return done

    def _get(self, keys: Sequence[str], pages: Sequence[Tensor]) -> list[bool]:
        began = time.perf_counter()
        halves = [self.pages.halves(page) for page in pages]
        outs = [(_landing(k), _landing(v)) for k, v in halves]
        done = self.chunks.read([self._block(key) for key in keys], [views(out) for out in outs])
        for wanted, out, is_read in zip(halves, outs, done, strict=True):
            for half, landed in zip(wanted, out, strict=True):
                if is_read and landed is not half:
                    half.copy_(landed)
        self._note(self._read, sum(done), began)
        return done

    def _note(self, notes: list[tuple[int, float]], pages: int, began: float) -> None:
        if pages and self._config.enable_storage_metrics:
            nbytes = pages * 2 * self.pages.layout.page_bytes
            notes.append((pages, nbytes / 1e9 / max(time.perf_counter() - began, 1e-9)))

    def _block(self, key: str) -> str:
        """The block hash, 64 hex digits, under which a page is kept.

        It covers SGLang's hash of the tokens and, of whose page it is, what a layout does not say: the part of a
        pipeline, and of a context that ranks share.
        """
        config, pool = self._config, self.pages.pool
        document = {
            "key": key,
            "layers": [pool.start_layer, pool.end_layer],
            "pp": [config.pp_rank, config.pp_size],
            "attn_cp": [config.attn_cp_rank, config.attn_cp_size],
        }
        return blake3(b"kvist hicache page v1\0" + canonical_json(document)).hexdigest()


def _landing(half: Tensor) -> Tensor:
    """Memory to read a half into: its own, if it lies there as it is stored."""
    return half if half.is_contiguous() else torch.empty(half.shape, dtype=half.dtype)
