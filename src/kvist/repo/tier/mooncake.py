"""A tier in Mooncake Store: pages in the memory of a cluster, over TCP or RDMA. The only door to mooncake.

Written for mooncake-transfer-engine 0.3.13. What to keep when memory is full is its master's to decide.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import queue
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from mooncake.store import MooncakeDistributedStore

from kvist.errors import StoreError
from kvist.hashing import Buffer
from kvist.repo.batch import windows
from kvist.repo.tier.base import Clock, PageTier

PREFIX: Final = "kvist-page-"
_SLAB: Final = 16 << 20
_SLABS: Final = 4
"""Registered buffers that pages arrive in: RDMA writes to registered memory only, and a reader's own is not."""
_NO_SPACE: Final = -200
_PROBE_S: Final = 0.5
_CLOSE_S: Final = 2.0


class MooncakeTier(PageTier):
    """Pages as objects ``kvist-page-<digest>``. A page of more than 16 MiB is not kept."""

    def __init__(
        self,
        master: str,
        *,
        metadata: str = "P2PHANDSHAKE",
        host: str | None = None,
        protocol: str = "tcp",
        device: str = "",
        segment: int = 0,
        buffer: int = 128 << 20,
        clock: Clock = time.monotonic,
    ) -> None:
        """Connect when it is first used.

        Args:
            master: ``host:port`` of the ``mooncake_master``.
            metadata: url of its metadata server, or this word if there is none.
            host: this machine's name or address for the others; ``None``: the address that reaches the master.
            protocol: ``"tcp"`` or ``"rdma"``.
            device: RDMA devices; empty: Mooncake chooses.
            segment: bytes of this process's memory to lend to the cluster; 0: it only reads and writes.
            buffer: bytes for values on their way.
            clock: see `PageTier`.
        """
        super().__init__(clock=clock)
        self._master, self._host = master, host
        self._settings = (metadata, segment, buffer, protocol, device)
        self._lock = threading.Lock()
        self._store: Any = None
        self._slabs: queue.SimpleQueue[memoryview] = queue.SimpleQueue()

    @property
    def url(self) -> str:
        """``mooncake://master:port``."""
        return f"mooncake://{self._master}"

    def _read(self, names: Sequence[str], outs: Sequence[memoryview]) -> list[bool]:
        store = self._connected()
        found: list[bool] = []
        slab = self._slabs.get()
        try:
            pairs = list(zip(names, outs, strict=True))
            for window in windows(pairs, [len(out) for out in outs], _SLAB):
                found += self._read_window(store, slab, window)
        finally:
            self._slabs.put(slab)
        return found

    def _read_window(self, store: Any, slab: memoryview, window: Sequence[tuple[str, memoryview]]) -> list[bool]:
        sizes = {name: len(out) for name, out in window}  # it fails for a key that is asked for twice
        if max(sizes.values()) > _SLAB:
            return [False] * len(window)
        starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        address = ctypes.addressof(ctypes.c_char.from_buffer(slab))
        places = [address + start for start in starts.values()]
        got = store.batch_get_into([PREFIX + name for name in sizes], places, list(sizes.values()))
        self._check(got)
        read = dict(zip(sizes, got, strict=True))
        found = []
        for name, out in window:
            found.append(read[name] == len(out))
            if found[-1]:
                out[:] = slab[starts[name] : starts[name] + len(out)]
        return found

    def _write(self, items: Sequence[tuple[str, Buffer]]) -> list[str]:
        store = self._connected()
        kept = [(name, data) for name, data in items if memoryview(data).nbytes <= _SLAB]
        if kept:
            self._check([store.upsert_batch([PREFIX + name for name, _ in kept], [data for _, data in kept])])
        return [name for name, _ in kept]

    def _forget(self, names: Sequence[str]) -> None:
        self._check(self._connected().batch_remove([PREFIX + name for name in names], True))

    def close(self) -> None:
        """Leave the cluster. Idempotent. It waits for a master that is gone; we do not."""
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            leaving = threading.Thread(target=store.close, name="kvist-mooncake-close", daemon=True)
            leaving.start()
            leaving.join(_CLOSE_S)

    def _check(self, codes: Sequence[int]) -> None:
        """Refuse codes of calls that failed as a whole; those from -700 to -799 tell of one object."""
        worst = min(codes)
        if worst < 0 and not -800 < worst <= -700 and worst != -600:  # -600: a buffer too small for the object
            raise StoreError(f"code {worst}" + ": no room" * (worst == _NO_SPACE))

    def _connected(self) -> Any:
        """The store.

        Raises:
            StoreError: its master does not answer.
        """
        with self._lock:
            if self._store is None:
                self._store = self._connect()
            if self._store.health_check() != 0:
                raise StoreError("its master does not answer")
            return self._store

    def _connect(self) -> Any:
        metadata, segment, buffer, protocol, device = self._settings
        host, _, port = self._master.rpartition(":")
        try:  # its own attempts at a master that is not there take minutes
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S) as probe:
                here = self._host or probe.getsockname()[0]
        except OSError as error:
            raise StoreError(f"its master cannot be reached: {error.strerror or error}") from error
        store = MooncakeDistributedStore()
        code = store.setup(here, metadata, segment, buffer, protocol, device, self._master)
        if code != 0:
            raise StoreError(f"it cannot be joined: code {code}")
        memory = memoryview(mmap.mmap(-1, _SLAB * _SLABS))
        if store.register_buffer(ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory)) != 0:
            raise StoreError(f"{len(memory)} bytes cannot be registered for {protocol}")
        self._slabs = queue.SimpleQueue()
        for start in range(0, len(memory), _SLAB):
            self._slabs.put(memory[start : start + _SLAB])
        return store
