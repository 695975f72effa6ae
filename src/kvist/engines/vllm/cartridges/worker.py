"""The cartridge connector in a worker: cartridges in host memory, and copies of their pages into blocks.

The engine's thread only hands loads over; threads of our own read, check, pack and copy. Knows cartridges and pages;
must not know how requests are scheduled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from kvist.cartridge.config import CartridgeConfig
from kvist.cartridge.library import Entry
from kvist.cartridge.manifest_file import read_manifest
from kvist.cartridge.reading import Loader
from kvist.cartridge.residency import Residency
from kvist.engines.paged.arrivals import Arrivals
from kvist.engines.paged.pages import Done, GroupPages
from kvist.engines.paged.plans import Load
from kvist.engines.paged.staging import unbind
from kvist.engines.vllm.cartridges.messages import InjectPlan
from kvist.engines.vllm.cartridges.packing import Packed, Packer, layers_of
from kvist.engines.vllm.messages import StepReport
from kvist.engines.vllm.pages import pages_of
from kvist.errors import EngineError, InvalidInput, KvistError, NotFound
from kvist.layout import Layout

log = logging.getLogger("kvist.vllm")

_LOADERS: Final = 2


class CartridgeWorker:
    """See the module.

    Attributes:
        layouts: this rank's, by group.
        arrivals: what became of loads.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        config: CartridgeConfig,
        attention: Mapping[str, Any],
        entries: Callable[[], Sequence[Entry]],
    ) -> None:
        """Load nothing yet.

        Args:
            layouts: of this rank, by group.
            config: of the connector.
            attention: vLLM's attention layers, by name; complete once caches are registered.
            entries: the cartridges that are configured, those to load ahead first; asked once, in a thread.
        """
        self.layouts = list(layouts)
        self.arrivals = Arrivals()
        self._config, self._attention, self._entries = config, attention, entries
        self._directories: dict[str, str] = {}
        self._loader = Loader(verify=config.verify)
        self._groups: list[GroupPages] = []
        self._packer: Packer | None = None
        self._residency: Residency[Packed] | None = None
        self._on_device = False
        # Apart, so that what is there need not wait for what is read from a disk.
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="kvist-inject", initializer=unbind)
        self._readers = ThreadPoolExecutor(_LOADERS, thread_name_prefix="kvist-pack", initializer=unbind)

    def register(self, caches: dict[str, torch.Tensor], groups: Sequence[Sequence[str]], blocks: int) -> None:
        """The cache of each layer, once vLLM has made them. Loads ahead what the configuration names, in a thread.

        Raises:
            LayoutMismatch: a cache that no cartridge can be in, or a configured cartridge that does not fit.
            InvalidInput: a configured cartridge is larger than all the memory for cartridges.
        """
        self._groups = [
            pages_of(layout, [caches[name] for name in names], blocks)
            for layout, names in zip(self.layouts, groups, strict=True)
        ]
        self._on_device = any(cache.device.type != "cpu" for cache in caches.values())
        self._packer = Packer(self.layouts, self._groups, layers_of(groups, caches, self._attention))
        entries = self._entries()
        for entry in entries:
            self._packer.check(entry.manifest)
        largest = max((self._packer.size_of(entry.manifest) for entry in entries), default=0)
        capacity = self._config.capacity(largest)
        if largest > capacity:
            raise InvalidInput(f"host_bytes: expected room for the largest cartridge, {largest} bytes, got {capacity}")
        self._residency = Residency(capacity, self._pack, self._size_of, check=self._check)
        for entry in entries:
            if entry.cartridge_id in self._config.preload:
                self._directories[entry.manifest.identity] = str(entry.directory)
                self._readers.submit(self._load_ahead, entry)

    @property
    def residency(self) -> Residency[Packed]:
        """The cartridges in host memory, by identity; once caches are registered.

        Raises:
            EngineError: they are not.
        """
        if self._residency is None:
            raise EngineError("expected the KV caches to be registered by now")
        return self._residency

    def stats(self) -> dict[str, int | float]:
        """What this worker has done since it started, and what is resident."""
        arrivals = self.arrivals
        return asdict(self.residency.metrics()) | {
            "injections": arrivals.loads,
            "injections_failed": arrivals.failed,
            "pages_injected": arrivals.pages,
            "bytes_injected": arrivals.nbytes,
            "injection_seconds": arrivals.seconds,
        }

    # -- in every step -------------------------------------------------------------------------------------------

    def before_step(self, plan: InjectPlan) -> None:
        """Nothing has to be done before a step."""

    def start_loads(self, plan: InjectPlan) -> None:
        """Begin to bring in what requests wait for."""
        self._directories.update(plan.directories)
        if plan.loads:
            after = Done(self._on_device)
            for load in plan.loads:
                threads = self._loaders if self.residency.contains(load.content) else self._readers
                threads.submit(self._load, load, after)

    def take_arrived(self) -> tuple[set[str], set[str], set[int]]:
        """See `Arrivals.take`."""
        return self.arrivals.take()

    def take_report(self) -> StepReport | None:
        """See `Arrivals.take_report`."""
        return StepReport.of(self.arrivals.take_report())

    # -- in threads ----------------------------------------------------------------------------------------------

    def _load(self, load: Load, after: Done) -> None:
        """Bring a cartridge into memory if it is not there, and its pages into the cache."""
        try:
            with self.residency.acquire(load.content, wait=True) as lease:
                started = time.perf_counter()
                nbytes = self._inject(load, lease.value, after)
        except Exception as error:
            if isinstance(error, KvistError):
                log.error("request %s: its cartridge cannot be had: %s", load.request_id, error)
            else:
                log.exception("request %s: injecting its cartridge failed", load.request_id)
            self.arrivals.fail(load)
        else:
            self.arrivals.arrive(load, nbytes, time.perf_counter() - started)

    def _inject(self, load: Load, packed: Packed, after: Done) -> int:
        written = []
        nbytes = 0
        for number, group in enumerate(self._groups):
            pages = [(place.block, int(page)) for place, page in load.pages if place.group == number]
            slots = [page - packed.first[number] for _, page in pages]
            if slots:
                written.append(group.write([block for block, _ in pages], packed.rows[number], slots, after))
                nbytes += len(slots) * group.page_bytes
        for done in written:
            done.wait()
        return nbytes

    def _pack(self, identity: str) -> Packed:
        assert self._packer is not None
        with self._loader.open(self._directory(identity), identity) as layers:
            return self._packer.pack(layers.manifest, layers)

    def _size_of(self, identity: str) -> int:
        assert self._packer is not None
        return self._packer.size_of(read_manifest(self._directory(identity), identity))

    def _check(self, identity: str) -> None:
        """What can be seen before anything goes for it; what is wrong with the rest is seen while it is packed."""
        self._loader.check(self._directory(identity), identity)

    def _directory(self, identity: str) -> Path:
        """The one that was named last for it.

        Raises:
            NotFound: none was.
        """
        directory = self._directories.get(identity)
        if directory is None:
            raise NotFound(f"no directory is known of cartridge {identity}")
        return Path(directory)

    def _load_ahead(self, entry: Entry) -> None:
        try:
            is_there = self.residency.prefetch(entry.manifest.identity)
        except KvistError as error:
            log.error("cartridge %s cannot be loaded ahead: %s", entry.cartridge_id, error)
        else:
            if not is_there:
                log.warning("cartridge %s is not loaded ahead: there is no room", entry.cartridge_id)

    def close(self) -> None:
        """Stop the threads, and let go of the memory."""
        for threads in (self._loaders, self._readers):
            threads.shutdown(cancel_futures=True)
        if self._residency is not None:
            self._residency.close()
