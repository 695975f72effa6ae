"""What is used of LMCache 0.5.6, and what stands in for it where it is not installed. The only door to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Hasher = Callable[[Sequence[int]], Iterable[tuple[int, int, int | bytes]]]
"""From token ids to start, end and hash of each chunk, as LMCache makes them."""

__all__ = ["Hasher", "StoragePluginInterface", "hasher", "memory_format"]

try:
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.storage_backend.abstract_backend import StoragePluginInterface
    from lmcache.v1.token_database import ChunkedTokenDatabase
except ImportError:
    MemoryFormat = ChunkedTokenDatabase = None

    class StoragePluginInterface:  # type: ignore[no-redef]
        """Keeps what LMCache's would."""

        def __init__(
            self,
            dst_device: str = "cpu",
            config: Any = None,
            metadata: Any = None,
            local_cpu_backend: Any = None,
            loop: Any = None,
        ) -> None:
            self.dst_device, self.config, self.metadata = dst_device, config, metadata
            self.local_cpu_backend, self.loop = local_cpu_backend, loop


def memory_format(name: str) -> Any:
    """LMCache's memory format of this name; without LMCache the name."""
    return name if MemoryFormat is None else MemoryFormat[name]


def hasher(config: Any, metadata: Any) -> Hasher:
    """How LMCache hashes the chunks of a prompt under this configuration.

    Its token database is asked, but made without its constructor: that draws vLLM's first hash anew (up to vLLM 0.28 a
    random number, unless ``PYTHONHASHSEED`` is set), after which nobody's prefix cache would hit. Without LMCache there
    are no chunks.
    """
    if ChunkedTokenDatabase is None:
        return lambda token_ids: ()  # no key has a hash then
    database = ChunkedTokenDatabase.__new__(ChunkedTokenDatabase)
    database.hash_func = database._get_vllm_hash_func(config.pre_caching_hash_algorithm)
    database.config, database.metadata, database.chunk_size = config, metadata, config.chunk_size

    def chunks(token_ids: Sequence[int]) -> Iterable[tuple[int, int, int | bytes]]:
        found: Iterable[tuple[int, int, int | bytes]] = database.process_tokens(tokens=list(token_ids), make_key=False)
        return found

    return chunks
