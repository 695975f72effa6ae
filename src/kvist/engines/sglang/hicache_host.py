"""What the HiCache backend uses of SGLang 0.5.23, and what stands in for it elsewhere: its only door."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvist.engines.paged.pinning import pinned as paged_pinned

__all__ = ["HiCacheStorage", "kv_cache_dtype", "pinned", "storage_metrics"]

try:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage
    from sglang.srt.observability.metrics_collector import StorageMetrics
    from sglang.srt.runtime_context import get_server_args
except ImportError:
    StorageMetrics = get_server_args = None

    class HiCacheStorage:  # type: ignore[no-redef]
        """Keeps what SGLang's would."""

        def register_mem_pool_host(self, mem_pool_host: Any) -> None:
            """Keep the host pool."""
            self.mem_pool_host = mem_pool_host


def pinned(model: str | None, given: str | None) -> str:
    """What decides the KV of given tokens: the weights, and what the command line changes about the model.

    Args:
        model: SGLang's name of the model, taken for its path where this process serves none.
        given: what pins the weights, if somebody said so.

    Raises:
        UnsupportedModel: nothing pins the weights.
    """
    args = _server_args()
    overrides = getattr(args, "json_model_override_args", None)
    return paged_pinned(
        Path(args.model_path if args is not None else model or "a model without a name"),
        given=given,
        asked=getattr(args, "revision", None),
        changes={
            "overrides": None if overrides == "{}" else overrides,
            "quantization": getattr(args, "quantization", None),
            "dtype": None if (dtype := getattr(args, "dtype", None)) == "auto" else dtype,
        },
        option="in --hicache-storage-backend-extra-config",
    )


def kv_cache_dtype() -> str | None:
    """The server's ``--kv-cache-dtype``; ``None`` where this process serves none."""
    args = _server_args()
    return None if args is None else str(args.kv_cache_dtype)


def storage_metrics(read: Sequence[tuple[int, float]], stored: Sequence[tuple[int, float]]) -> Any:
    """SGLang's record of transfers; ``None`` without SGLang.

    Args:
        read, stored: pages and GB/s of each call.
    """
    if StorageMetrics is None:
        return None
    return StorageMetrics(
        prefetch_pgs=[pages for pages, _ in read],
        backup_pgs=[pages for pages, _ in stored],
        prefetch_bandwidth=[speed for _, speed in read],
        backup_bandwidth=[speed for _, speed in stored],
    )


def _server_args() -> Any:
    """The arguments of this process's server, if there is one."""
    if get_server_args is None:
        return None
    try:
        return get_server_args()
    except ValueError:  # "Global server args is not set yet!"
        return None
