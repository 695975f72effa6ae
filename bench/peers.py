"""Peers of `kvist.repo` for bench/store.py: each puts the same pages and gets them back, as its users would."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from pathlib import Path
from typing import Any, Protocol


class Peer(Protocol):
    name: str
    promise: str  # what it gives, and does not, for its speed
    share: float  # part of the data it is given; slow peers get less

    def put(self, directory: Path, pages: list[memoryview]) -> None: ...
    def reput(self, pages: list[memoryview]) -> None: ...
    def get(self) -> int: ...
    def close(self) -> None: ...


class ProcessFork:
    name = "processfork"
    promise = "sha256, zstd-19, fsync a blob, verified"
    share = 1 / 64

    def __init__(self) -> None:
        import processfork

        self._pf = processfork

    def put(self, directory: Path, pages: list[memoryview]) -> None:
        self._store = self._pf.PfStore.open(str(directory))
        self.reput(pages)

    def reput(self, pages: list[memoryview]) -> None:
        self._cids = [self._pf.put_blob(self._store, bytes(page)) for page in pages]

    def get(self) -> int:
        return sum(len(self._pf.read_blob(self._store, cid)) for cid in self._cids)

    def close(self) -> None:
        pass


class Safetensors:
    name = "safetensors"
    promise = "one file, no digest, no fsync, no dedup"
    share = 1.0

    def __init__(self) -> None:
        import numpy
        import safetensors.numpy

        self._numpy, self._safetensors = numpy, safetensors.numpy

    def put(self, directory: Path, pages: list[memoryview]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "pages.safetensors"
        arrays = {str(i): self._numpy.frombuffer(page, dtype=self._numpy.uint8) for i, page in enumerate(pages)}
        self._safetensors.save_file(arrays, self._path)

    def reput(self, pages: list[memoryview]) -> None:
        self.put(self._path.parent, pages)

    def get(self) -> int:
        return sum(array.nbytes for array in self._safetensors.load_file(self._path).values())

    def close(self) -> None:
        pass


class LMCache:
    name = "lmcache disk"
    promise = "a file a page, O_DIRECT, 4 threads, no digest, no fsync; re-put compares keys only"
    share = 1.0

    def __init__(self) -> None:
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        logging.getLogger("lmcache").setLevel(logging.ERROR)
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("lmcache"):
                logging.getLogger(name).setLevel(logging.ERROR)
        self._torch, self._key_type, self._format = torch, CacheEngineKey, MemoryFormat
        self._config_type, self._metadata_type = LMCacheEngineConfig, LMCacheMetadata
        self._cpu_type, self._disk_type = LocalCPUBackend, LocalDiskBackend
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._cpu: Any = None

    def put(self, directory: Path, pages: list[memoryview]) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        size = len(pages[0])
        config = self._config_type.from_defaults(
            chunk_size=16,
            local_cpu=False,
            max_local_cpu_size=3.0,
            local_disk=f"file://{directory}",
            max_local_disk_size=8.0,
            extra_config={"use_odirect": True},
        )
        metadata = self._metadata_type("bench", 1, 1, 0, 0, self._torch.uint8, (1, 1, 16, 1, max(1, size // 16)))
        if self._cpu is None:
            self._cpu = self._cpu_type(config, metadata, dst_device="cpu")
        self._disk = self._disk_type(config, self._loop, self._cpu, dst_device="cpu")
        self.reput(pages)

    def reput(self, pages: list[memoryview]) -> None:
        done = threading.Semaphore(0)
        torch = self._torch
        objects = []
        self._keys = [self._key_type("bench", 1, 0, i, torch.uint8) for i in range(len(pages))]
        fresh = 0
        for key, page in zip(self._keys, pages, strict=True):
            if self._disk.contains(key):
                continue
            found = self._cpu.allocate(torch.Size([len(page)]), torch.uint8, self._format.KV_T2D)
            found.tensor.view(-1).copy_(torch.frombuffer(page, dtype=torch.uint8))
            objects.append(found)
            self._disk.submit_put_task(key, found, on_complete_callback=lambda _: done.release())
            fresh += 1
        for _ in range(fresh):
            done.acquire()
        for one in objects:
            one.ref_count_down()

    def get(self) -> int:
        total = 0
        for start in range(0, len(self._keys), 256):
            found = self._disk.batched_get_blocking(self._keys[start : start + 256])
            for one in found:
                total += one.get_size()
                one.ref_count_down()
        return total

    def close(self) -> None:
        self._disk.close()


PEERS: list[type[Any]] = [ProcessFork, Safetensors, LMCache]
