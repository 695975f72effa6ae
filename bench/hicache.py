"""HiCache backends on one host pool: kvist's against SGLang's own file backend, pages written and read back.

    python bench/hicache.py [--layers 32] [--heads 8] [--dim 128] [--page-size 64] [--pages 64] [--repeat 3]
                            [--directory DIR]

For an interpreter that has SGLang 0.5.23 and kvist, with ``tests/sglang/shims`` on ``PYTHONPATH`` where there is no
accelerator. SGLang's own host pool, bfloat16 from a generator, asked as its controller asks: kvist's backend for slots
of the pool (``interface_v1``), the file backend for tensors, which is what it has. Contestants take turns; a figure is
the median of the repetitions. Reads come from the page cache. kvist's writes are durable when they return (fsync) and
its reads verified (BLAKE3); the file backend does neither, so beside it stands kvist without fsync.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402

from kvist.engines.sglang.hicache import KvistHiCache  # noqa: E402


def host_pool(args: Any, layout: str) -> Any:
    """A host pool with room for all pages twice, the first half filled."""
    device = MHATokenToKVPool(
        args.page_size, args.page_size, torch.bfloat16, args.heads, args.dim, args.layers, "cpu", False
    )
    pool = MHATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info,
        1.0,
        0,
        args.page_size,
        layout,
        pin_memory=False,
        device_capacity_tokens=device.size,
        start_layer=device.start_layer,
        end_layer=device.end_layer,
        host_token_capacity=2 * args.pages * args.page_size,
    )
    pool.kv_buffer.normal_(generator=torch.Generator().manual_seed(0))
    return pool


def config(options: dict[str, Any]) -> HiCacheStorageConfig:
    """What SGLang tells a backend on one rank."""
    return HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, False, "bench", extra_config=options)


def kvist(directory: Path, pool: Any, *, durable: int) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """kvist's backend over a new repository: how to write, to read and to end it."""
    url = f"{directory.as_uri()}?durable={durable}"
    backend = KvistHiCache(config({"store": url, "revision": "r", "max_bytes": 1 << 40}))
    backend.register_mem_pool_host(pool)
    return backend.batch_set_v1, backend.batch_get_v1, backend.close


def file(directory: Path, pool: Any) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """SGLang's file backend, asked for tensors as `HiCacheController` does."""
    backend = HiCacheFile(config({"file_storage_path": str(directory)}))
    size = pool.page_size

    def write(keys: list[str], slots: torch.Tensor) -> list[bool]:
        pages = [pool.get_data_page(index) for index in slots[::size].tolist()]
        return [backend.batch_set(keys, pages)]

    def read(keys: list[str], slots: torch.Tensor) -> list[bool]:
        pages = backend.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
        for index, page in zip(slots[::size].tolist(), pages, strict=True):
            pool.set_from_flat_data_page(index, page)
        return [page is not None for page in pages]

    return write, read, lambda: None


def main() -> None:
    """Run the arms in turns; print GB/s, and each arm's ratio to the file backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in {"layers": 32, "heads": 8, "dim": 128, "page-size": 64, "pages": 64, "repeat": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--directory", type=Path, default=None)
    args = SimpleNamespace(**vars(parser.parse_args()))
    keys = [f"{number:064x}" for number in range(args.pages)]
    here = torch.arange(args.pages * args.page_size)
    there = here + len(here)
    for layout in ("layer_first", "page_first", "page_first_direct"):
        pool = host_pool(args, layout)
        nbytes = pool.kv_buffer.nbytes / 2
        arms = {
            "file": file,
            "kvist": lambda place, pool: kvist(place, pool, durable=1),
            "kvist, no fsync": lambda place, pool: kvist(place, pool, durable=0),
        }
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for _ in range(args.repeat):
            for name, arm in arms.items():
                place = Path(tempfile.mkdtemp(dir=args.directory))
                write, read, end = arm(place, pool)
                began = time.perf_counter()
                assert all(write(keys, here))
                written = time.perf_counter()
                assert all(read(keys, there))
                took[name].append((written - began, time.perf_counter() - written))
                end()
                shutil.rmtree(place)
        best = {name: [statistics.median(each) for each in zip(*pairs, strict=True)] for name, pairs in took.items()}
        print(f"{layout}: {args.pages} pages of {nbytes / args.pages / 1e6:.1f} MB")
        for name, (write_s, read_s) in best.items():
            to_file = [theirs / ours for theirs, ours in zip(best["file"], (write_s, read_s), strict=True)]
            told = [
                f"{what} {nbytes / seconds / 1e9:5.2f} GB/s x{ratio:.2f}"
                for what, seconds, ratio in zip(("write", "read"), (write_s, read_s), to_file, strict=True)
            ]
            print(f"  {name:16} {'   '.join(told)}")


if __name__ == "__main__":
    main()
